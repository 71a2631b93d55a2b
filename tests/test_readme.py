"""The README is short, its blocks run as they stand and print what it says, and what it names exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from demo_model import demo_model_folder
from hub import put_in_hub
from programs import run_program

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAX_BYTES = 9_000
# What each block saves at its end.
FOLDERS = {"python": "merged", "shell": "final"}
# The command in a checkout that is not installed.
PQL = f'pql() {{ {sys.executable} -m peft_quantlayers "$@"; }}\n'


def block(kind: str) -> str:
    """The block of code after ``<!-- block KIND -->``."""
    return re.search(rf"<!-- block {kind} -->\n```\w+\n(.*?)```", README, re.S).group(1)


def printed(kind: str) -> list[str]:
    """The lines after ``<!-- output KIND -->``."""
    return re.search(rf"<!-- output {kind} -->\n```\w+\n(.*?)```", README, re.S).group(1).splitlines()


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    cache = put_in_hub(tmp_path / "hub", demo_model_folder())
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


@pytest.mark.real_model
@pytest.mark.parametrize("kind", ["python", "shell"])
def test_a_block_runs_as_it_stands_and_prints_what_the_readme_says(kind, tmp_path, environment):
    command = [sys.executable, "-c", block(kind)] if kind == "python" else ["bash", "-euc", PQL + block(kind)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in printed(kind) if line not in done.stdout] == []
    assert (tmp_path / FOLDERS[kind] / "tokenizer.json").exists()


def test_no_block_writes_a_folder_that_another_one_has_written():
    """It would be refused where a reader runs one after the other."""
    assert FOLDERS["python"] in re.findall(r'"(\w+)"', block("python"))
    written = re.findall(r"^(?:merged_)?output: (\w+)", block("shell"), re.M)
    assert FOLDERS["shell"] in written
    assert not set(written) & set(re.findall(r'"(\w+)"', block("python")))


def test_the_readme_is_short():
    assert len(README.encode()) <= MAX_BYTES


def test_the_tables_are_what_the_benchmarks_wrote():
    done = run_program("benchmarks/tables.py", "--check", cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_make_target_and_file_that_it_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([\w-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target
    named = set(re.findall(r"`?python ([\w/]+\.py)", README)) | set(
        re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", README)
    )
    assert len(named) > 15
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_figure_is_drawn_from_the_results(tmp_path):
    done = run_program("benchmarks/plots.py", "--output", tmp_path, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {
        file.name for file in (ROOT / "docs" / "images").glob("*.svg")
    }
