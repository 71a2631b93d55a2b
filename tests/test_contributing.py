"""What CONTRIBUTING and the page on new methods tell a newcomer to open or to run is there."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from programs import run_program
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
    paths -= {"my_package/absmax8.py"}  # the reader's
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


def test_every_pytest_command_of_a_page_selects_tests():
    assert len(COMMANDS) > 1
    program = (
        "import json, sys, pytest\n"
        "for arguments in map(json.loads, sys.argv[1:]):\n"
        "    status = pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', *arguments])\n"
        "    assert status == 0, arguments"  # 5 if nothing was selected
    )
    done = run_program("-c", program, *(json.dumps(shlex.split(arguments)) for arguments in COMMANDS), cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-500:]


def test_the_method_of_the_page_passes_the_contract_from_a_package_of_its_own(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", TEXTS["docs/new_method.md"], re.M | re.S)
    toml = re.search(r"^```toml\n(.*?)^```", TEXTS["docs/new_method.md"], re.M | re.S)[1]
    [(group, entry_points)] = tomllib.loads(toml)["project"]["entry-points"].items()
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "absmax8.py").write_text("\n\n".join(blocks))
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    lines = [f"[{group}]", *(f"{name} = {value}" for name, value in entry_points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))

    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        "tests/contract",
        "-k",
        "absmax8",
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    n_passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert n_passed > 50
    # Nothing is skipped but what needs a Hessian: the method's config pickles, also into a new process.
    assert re.findall(r"SKIPPED \[(\d+)\] (.*?):\d+: (.*)", done.stdout) == [
        ("1", "tests/contract/test_methods.py", "This method has no calibrated quantizer.")
    ]
