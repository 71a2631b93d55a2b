"""What CONTRIBUTING and the page on new methods tell a newcomer to open or to run is there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_floors import floor

ROOT = Path(__file__).parents[1]
PAGES = ["CONTRIBUTING.md", "docs/new_method.md"]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
# Where a path that a page names may begin.
PLACES = (ROOT, ROOT / "peft_quantlayers", ROOT / "kernels" / "quantlayers_kernels")
COMMANDS = sorted(
    {
        found.group(1)
        for text in TEXTS.values()
        for found in re.finditer(r"^[^#\n]*?python -m pytest ([^`\n]*)", text, re.M)
    }
)


def quoted(page: str) -> list[str]:
    """What stands in backquotes on a page, outside blocks of code."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.M | re.S))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page):
    paths = {path for path in quoted(page) if re.fullmatch(r"[\w.*/]+/[\w.*/]*|\w+\.(?:py|md|toml)", path)}
    links = set(re.findall(r"\]\(([\w./]+)\)", TEXTS[page]))
    assert paths
    missing = [path for path in paths if not any(list(place.glob(path.rstrip("/"))) for place in PLACES)]
    missing += [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


def test_the_list_of_packages_is_whole_and_goes_from_low_to_high():
    block = TEXTS["CONTRIBUTING.md"].partition("\npeft_quantlayers/\n")[2].partition("```")[0]
    listed = [name.removesuffix(".py") for name in re.findall(r"^  (\w+(?:\.py)?)/?  ", block, re.M)]
    parts = {path.stem for path in (ROOT / "peft_quantlayers").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert set(listed) == parts - {"__init__", "__pycache__"}
    floors = [floor(f"peft_quantlayers.{name}") for name in listed]
    assert floors == sorted(floors)


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_that_a_page_names_exists(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([\w-]+)", TEXTS[page]):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_every_name_of_the_package_that_contributing_quotes_exists():
    code = "\n".join(file.read_text() for place in PLACES[1:] for file in place.rglob("*.py"))
    code += "\n".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    names = {name for name in quoted("CONTRIBUTING.md") if re.fullmatch(r"\w+", name)}
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", code)] == []


@pytest.mark.parametrize("arguments", COMMANDS)
def test_every_pytest_command_of_a_page_selects_tests(arguments):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        *shlex.split(arguments),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]  # 5 if nothing was selected
