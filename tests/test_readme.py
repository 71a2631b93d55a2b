"""The README says what was measured, and its first example runs."""

import re
from pathlib import Path

import pytest
from demo_model import demo_model_folder
from programs import run_program

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_tables_are_what_the_benchmarks_wrote():
    done = run_program("benchmarks/tables.py", "--check", cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.real_model
def test_the_first_example_runs_as_it_stands(tmp_path):
    example = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    example = example.replace("HuggingFaceTB/SmolLM2-135M", str(demo_model_folder()))
    done = run_program("-c", example, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_every_make_target_and_file_that_it_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([\w-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for path in set(re.findall(r"`?python ([\w/]+\.py)", README)) | set(re.findall(r"\]\(([\w.]+)\)", README)):
        assert (ROOT / path).exists(), path
