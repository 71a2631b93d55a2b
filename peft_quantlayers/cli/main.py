"""``peft-quantlayers VERB ...``, ``pql VERB ...`` and ``python -m peft_quantlayers VERB ...``: which verb is meant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from .export import add_export, run_export
from .run import AUTOLOAD_FOLDER, RUN_HELP, run

PROGRAM = "peft-quantlayers"
EPILOG = """exit codes: 0 done, 1 it failed, 2 wrong usage, 130 interrupted; `run` exits as the program does"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, ``sys.argv`` if ``arguments`` is None; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["run"] and given[1:2] not in (["-h"], ["--help"]):
        return run(given[1:])  # not argparse's: all that follows is the program's
    parsed = _parser().parse_args(given)
    if parsed.verb == "autoload":
        print(AUTOLOAD_FOLDER)
    if parsed.verb == "export":
        return run_export(parsed)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, epilog=EPILOG, description="Export quantized models, and run other programs on them."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {_version()}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    described = argparse.RawDescriptionHelpFormatter
    verbs.add_parser(
        "run", usage=f"{PROGRAM} run PROGRAM ...", help="run another program with this package imported",
        description=RUN_HELP, formatter_class=described,
    )  # fmt: skip
    verbs.add_parser(
        "autoload",
        help="print the folder that, in PYTHONPATH, has every Python process import this package",
        description="Print a folder. In PYTHONPATH it has every Python process import this package as soon as it has "
        'imported transformers:\n\n  export PYTHONPATH="$(peft-quantlayers autoload):$PYTHONPATH"\n\n'
        "Nothing is installed; without the variable all is as before.",
        formatter_class=described,
    )
    add_export(verbs)
    return parser


def _version() -> str:
    try:
        return version("peft_quantlayers")
    except PackageNotFoundError:  # run from its sources
        return "(not installed)"
