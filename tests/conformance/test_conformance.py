"""A quick selection of PEFT's own tests on our layers, those of the lowest and of the newest supported PEFT.

`make conformance` runs them all.
"""

import json
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from programs import run_program
from upstream import FetchError

from conformance import run as conformance
from conformance.linears import SPECS, WITHOUT_SPEC
from conformance.plugin import add_to
from peft_quantlayers.methods import registered_methods

UNDER_TEST = """
import torch
from torch import nn
from peft import LoraConfig, get_peft_model
from peft_quantlayers import QuantizedLinear


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(10, 4)

    def forward(self, x):
        return self.lin(x)


def test_adapter():
    model = get_peft_model(Model(), LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False))
    layer = model.base_model.model.lin
    assert isinstance(layer.base_layer, QuantizedLinear)
    assert type(layer.lora_A["default"]) is nn.Linear
    x = torch.randn(3, 10)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_broken():
    raise ValueError("no such thing")
"""


def test_every_registered_method_runs_or_says_why_not():
    assert not set(SPECS) & set(WITHOUT_SPEC)
    assert set(SPECS) | set(WITHOUT_SPEC) == set(registered_methods())
    assert {method for method, _ in conformance.QUICK_METHODS} | set(conformance.NOT_QUICK) == set(SPECS)
    assert {version for _, version in conformance.QUICK_METHODS} == {conformance.LOWEST, conformance.NEWEST}


@pytest.mark.parametrize(("method", "version"), conformance.QUICK_METHODS)
def test_pefts_own_tests_pass_on_our_layers(method, version, tmp_path):
    try:
        source = conformance.prepared_source(version)
    except FetchError as error:
        pytest.skip(f"PEFT's tests are not in the cache and cannot be fetched: {error}")
    summary = tmp_path / "summary.json"
    command = conformance.pytest_command(
        source, method, files=conformance.QUICK_FILES, arguments=["-k", conformance.QUICK, "--summary", str(summary)]
    )
    done = subprocess.run(
        command, cwd=source, env=conformance.environment(source), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert json.loads(summary.read_text())[0]["passed_on_quantized"] >= 80


def test_the_lowest_version_is_the_one_that_the_package_asks_for():
    pyproject = tomllib.loads((conformance.TESTS.parent / "pyproject.toml").read_text())
    (peft,) = [Requirement(line) for line in pyproject["project"]["dependencies"] if line.startswith("peft")]
    (floor,) = [Version(part.version) for part in peft.specifier if part.operator == ">="]
    assert floor == Version(conformance.LOWEST)
    assert conformance.NEWEST in peft.specifier


def judged(folder, exceptions: str) -> tuple[int, dict]:
    """Exit status and summary of a run of ``UNDER_TEST`` with the given list of exceptions."""
    (folder / "tests").mkdir()
    (folder / "tests" / "test_made_up.py").write_text(UNDER_TEST)
    (folder / "exceptions.toml").write_text(exceptions)
    command = conformance.pytest_command(
        folder, "hqq", files=["test_made_up.py"],
        arguments=["--exceptions", str(folder / "exceptions.toml"), "--summary", str(folder / "summary.json")],
    )  # fmt: skip
    done = run_program(*command[1:], cwd=folder, env=conformance.environment(folder))
    *_, summary = json.loads((folder / "summary.json").read_text())
    return done.returncode, summary


def entry(tests: str, error: str) -> str:
    return f'[[exception]]\ntests = "{tests}"\nerror = "{error}"\nreason = "made up"\n'


def test_a_failure_that_is_on_the_list_with_its_error_is_no_failure(tmp_path):
    status, counts = judged(tmp_path, entry("test_made_up.py::test_broken", "no such thing"))
    assert status == 0
    assert (counts["passed"], counts["passed_on_quantized"], counts["expected_failures"]) == (1, 1, 1)


def test_runs_of_several_shards_share_a_summary_and_one_that_is_repeated_is_replaced(tmp_path):
    runs = [
        {"peft": "1", "method": "hqq", "shard": shard, "passed": n} for n, shard in enumerate(["1/2", "0/2", "1/2"])
    ]
    for run in runs:
        add_to(tmp_path / "summary.json", run)
    assert json.loads((tmp_path / "summary.json").read_text()) == runs[1:]


def test_a_failure_with_another_error_than_the_lists_and_an_entry_that_fails_no_more_fail_the_run(tmp_path):
    listed = entry("test_made_up.py::test_broken", "another error") + entry("*test_adapter", "fails no more")
    status, counts = judged(tmp_path, listed)
    assert status == 1
    assert counts["unexpected"] == ["test_made_up.py::test_broken"]
    assert "*test_adapter" in counts["stale"]


def test_an_entry_that_fails_no_more_is_enough_to_fail_the_run(tmp_path):
    listed = entry("test_made_up.py::test_broken", "no such thing") + entry("*test_adapter", "fails no more")
    status, counts = judged(tmp_path, listed)
    assert (status, counts["failed"]) == (1, 0)


def test_a_source_that_pip_cannot_fetch_says_what_pip_said(tmp_path, monkeypatch):
    from upstream import source_folder

    monkeypatch.setenv("PEFT_QUANTLAYERS_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchError, match=r"(?s)peft 0\.0\.0: .*No matching distribution"):
        source_folder("peft", "0.0.0")
    assert list((tmp_path / "sources").iterdir()) == []


def test_the_command_line_takes_version_and_method():
    done = run_program(conformance.__file__, "--help")
    assert "--peft" in done.stdout
    assert "--method" in done.stdout
