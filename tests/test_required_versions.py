"""A package that is too old is named at import, with the version that is wanted."""

import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from peft_quantlayers import required_versions

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


@pytest.fixture
def installed(monkeypatch):
    """Versions that are said to be installed, by package; those of the environment for the others."""
    found = {}
    own = required_versions.version
    monkeypatch.setattr(required_versions, "requires", lambda package: PROJECT["dependencies"])
    monkeypatch.setattr(required_versions, "version", lambda name: found.get(name) or own(name))
    return found


def test_the_installed_versions_are_no_error(installed):
    required_versions.check_required_versions()


@pytest.mark.parametrize(
    ("name", "old"),
    [("transformers", "4.57.1"), ("peft", "0.20.0"), ("torch", "2.8.0+cpu")],
)
def test_an_older_one_is_an_error_with_the_way_out(name, old, installed):
    installed[name] = old
    with pytest.raises(
        ImportError, match=rf'needs {name} .*, and {old.replace("+", ".")} is installed.*pip install "'
    ):
        required_versions.check_required_versions()


def test_a_newer_one_and_a_development_version_are_tried(installed):
    installed.update(transformers="6.1.0.dev0", peft="0.22.0.dev0", torch="2.15.0a0+git")
    required_versions.check_required_versions()


def test_a_checkout_that_is_not_installed_checks_nothing(installed, monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    installed["peft"] = "0.1"
    monkeypatch.setattr(required_versions, "requires", missing)
    required_versions.check_required_versions()


def test_what_is_checked_is_required():
    assert set(required_versions.CHECKED) <= {Requirement(line).name for line in PROJECT["dependencies"]}


def test_every_python_that_is_claimed_is_in_the_matrix_and_its_targets_are_there():
    root = Path(__file__).parents[1]
    job = yaml.safe_load((root / ".github/workflows/tests.yml").read_text())["jobs"]["tests"]
    matrix = job["strategy"]["matrix"]
    claimed = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if "Python :: 3." in each]
    assert matrix["python"] == claimed
    targets = {*matrix["target"], *(each["target"] for each in matrix["include"])}
    rules = (root / "Makefile").read_text().splitlines()
    assert all(any(rule.startswith(f"{target}:") for rule in rules) for target in targets)
    assert job["steps"][-1]["run"] == "make ${{ matrix.target }}"
