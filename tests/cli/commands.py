"""Verbs in this process: what they print, and the one line that says what is wrong."""

from peft_quantlayers.cli import main

TEXT = "The lamp is red, the chair is blue, and the table is neither.\n\n" * 60


def printed(capsys, arguments: list[str], *, exit_code: int = 0) -> str:
    capsys.readouterr()
    assert main(arguments) == exit_code
    return capsys.readouterr().out


def refused(capsys, arguments: list[str], exit_code: int) -> str:
    capsys.readouterr()
    assert main(arguments) == exit_code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("peft-quantlayers ")]
    assert len(lines) == 1
    return lines[0]
