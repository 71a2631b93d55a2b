"""Converters run in a process of their own; the other tests of exports run them in children of theirs."""

import os

import pytest

from peft_quantlayers.exports.own_process import convert_with, run_python


def test_it_has_its_own_modules_and_environment(tmp_path):
    (tmp_path / "gguf.py").write_text("here = 'another gguf'")
    program = "import sys, gguf; print(gguf.here); print('torch' in sys.modules); sys.exit(3)"
    assert run_python(["-c", program], os.environ | {"PYTHONPATH": str(tmp_path)}) == (3, "another gguf\nFalse\n")


@pytest.mark.parametrize(
    "program", ["print('words')", "raise SystemExit('words')", "open('made', 'w'); raise SystemExit('words')"]
)
def test_a_failure_is_told_in_the_converters_words(tmp_path, program):
    with pytest.raises(ValueError, match=r"The converter does not take this model; nothing was written(.|\n)*words"):
        convert_with(
            "The converter",
            ["-c", f"import os; os.chdir({str(tmp_path)!r}); {program}"],
            os.environ,
            tmp_path / "made",
        )
    convert_with("The converter", ["-c", f"open({str(tmp_path / 'made')!r}, 'w')"], os.environ, tmp_path / "made")


def test_of_a_traceback_the_error_is_shown_alone(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("def inner():\n    raise NotImplementedError('unknown words')\n\ninner()\n")
    with pytest.raises(ValueError, match="unknown words") as refused:
        convert_with("The converter", [str(script)], os.environ, tmp_path / "made", way_out="Try another.")
    assert str(refused.value) == (
        "The converter does not take this model; nothing was written. Try another. It says:\n  "
        "NotImplementedError: unknown words"
    )
