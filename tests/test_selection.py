"""What `make check` runs, and that the list of slow tests names tests that there are."""

from pathlib import Path

import pytest
from selection import ALWAYS, ROOT, SLOW, THOROUGH, is_slow, is_thorough, mirrors_of, selected

EXISTING = [file.relative_to(ROOT).as_posix() for file in (ROOT / "tests").rglob("*.py")]


@pytest.mark.parametrize("entry", SLOW)
def test_a_slow_entry_names_a_test_that_exists(entry: str):
    file, _, function = entry.partition("::")
    assert f"def {function or 'test_'}" in (ROOT / file).read_text()
    assert is_slow(f"{entry}[1-True]")


@pytest.mark.parametrize("entry", THOROUGH)
def test_a_thorough_entry_names_a_test_that_exists(entry: str):
    file, _, function = entry.partition("::")
    assert f"def {function.partition('[')[0] or 'test_'}" in (ROOT / file).read_text()
    assert is_thorough(f"{entry}[1-True]")


@pytest.mark.parametrize("path", ALWAYS)
def test_what_always_runs_exists(path: str):
    assert (ROOT / path).exists()


def test_a_file_has_the_tests_that_mirror_it():
    existing = [
        "tests/lora/test_layer.py",
        "tests/kernels/test_hqq_cpu.py",
        "tests/kernels/test_native.py",
        "tests/methods/test_aqlm.py",
        "tests/methods/test_hqq_solver.py",
        "tests/test_model.py",
        "tests/implementations.py",
    ]
    mirrored = {
        "peft_quantlayers/lora/layer.py": ["tests/lora/test_layer.py"],
        "peft_quantlayers/lora/loraga.py": ["tests/lora"],
        "peft_quantlayers/methods/hqq/solver.py": ["tests/methods/test_hqq_solver.py"],
        "peft_quantlayers/methods/aqlm/method.py": ["tests/methods/test_aqlm.py"],
        "peft_quantlayers/model.py": ["tests/test_model.py"],
        "peft_quantlayers/newroom/thing.py": [],
        "kernels/quantlayers_kernels/hqq/cpu.py": ["tests/kernels/test_hqq_cpu.py"],
        "kernels/quantlayers_kernels/native.py": ["tests/kernels/test_native.py"],
        "kernels/quantlayers_kernels/csrc/hqq_solve.h": ["tests/kernels"],
        "tests/lora/test_layer.py": ["tests/lora/test_layer.py"],
        "tests/implementations.py": [],
        "tests/lora/test_gone.py": [],
        "README.md": [],
    }
    assert {changed: mirrors_of(changed, existing) for changed in mirrored} == mirrored


def test_a_file_inside_a_selected_folder_is_not_named_again():
    paths = selected(["peft_quantlayers/lora/loraga.py", "tests/lora/test_layer.py"])
    assert "tests/lora" in paths
    assert "tests/lora/test_layer.py" not in paths
    assert set(ALWAYS) <= set(paths)
    assert all(Path(ROOT, path).exists() for path in paths)
