"""``peft-quantlayers VERB ...``, ``pql VERB ...`` and ``python -m peft_quantlayers VERB ...``: which verb is meant."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from .option_names import WrongUsage
from .options import EPILOG, PROGRAM, check_names, help_text
from .quiet import leave_out_what_others_say
from .run import AUTOLOAD_FOLDER, RUN_HELP, run
from .spelling import nearest

VERBS = {
    "quantize": "quantize a model and save it",
    "train": "train an adapter on a quantized model",
    "merge": "merge an adapter into its quantized model",
    "export": "write a model as an inference engine reads it",
    "evaluate": "measure a model on text and tasks",
    "inspect": "say what a folder holds",
    "estimate": "say what memory, disk and time the work will take",
    "report": "write a page with plots on a model, a training run or a merge",
    "chat": "talk with a model",
    "run": "run another program with this package imported",
    "autoload": "print the folder that, in PYTHONPATH, has every Python process import this package",
}
# Verbs without options: what follows is the program's, or nothing.
WITHOUT_OPTIONS = ("run", "autoload")
AUTOLOAD_HELP = f"""Print a folder. In PYTHONPATH it has every Python process import this package as soon as it has
imported transformers:

  export PYTHONPATH="$({PROGRAM} autoload):$PYTHONPATH"

Nothing is installed; without the variable all is as before."""
FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, ``sys.argv`` if ``arguments`` is None; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        exit_code = _run(given)
        if sys.stdout is not None:  # it may be closed
            sys.stdout.flush()
    except KeyboardInterrupt:  # before the work, or after it
        if given[:1] == ["run"]:  # the program's, as it would be without us
            raise
        return said(f"{' '.join(given[:1])}: interrupted.", INTERRUPTED)
    except BrokenPipeError:  # the program that reads what is printed, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return exit_code


def _run(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(_help())
        return 0 if given else WRONG_USAGE
    if given[0] == "--version":
        print(f"{PROGRAM} {version('peft_quantlayers')}")
        return 0
    verb, *rest = given
    if verb not in VERBS:
        return said(f"{verb}: there is no such verb{nearest(verb, VERBS)}. {PROGRAM} --help lists them.", WRONG_USAGE)
    if verb in WITHOUT_OPTIONS:
        is_help = rest[:1] in (["-h"], ["--help"])
        if verb == "run" and not is_help:
            return run(rest)
        if rest and not is_help:
            return said(f"{verb}: {rest[0]!r} is one argument too many; {verb} takes none.", WRONG_USAGE)
        print((RUN_HELP if verb == "run" else AUTOLOAD_HELP) if is_help else AUTOLOAD_FOLDER)
        return 0
    if {"-h", "--help"} & set(rest):
        print(help_text(verb))
        return 0
    try:
        check_names(verb, rest)
    except WrongUsage as error:
        return said(f"{verb}: {error}", WRONG_USAGE)
    if "--debug" not in rest:
        leave_out_what_others_say()
    try:
        work = importlib.import_module("peft_quantlayers.cli.work")
    except KeyboardInterrupt:
        return said(f"{verb}: interrupted. Nothing was begun.", INTERRUPTED)
    except ImportError as error:
        if "--debug" in rest:
            raise
        return said(f"{verb}: {' '.join(str(error).split())}", FAILED)
    return work.run_verb(verb, rest)


def said(message: str, exit_code: int) -> int:
    """Print ``message`` as an error; ``exit_code``."""
    print(f"{PROGRAM} {message}", file=sys.stderr)
    return exit_code


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{width}}  {text}" for name, text in VERBS.items())
    return (
        f"usage: {PROGRAM} VERB [config.yaml] [--option value ...]\n\n"
        "Quantize language models, train adapters on them, merge back, save and measure.\n\n"
        f"{verbs}\n\n{PROGRAM} VERB --help lists the options of a verb; a YAML file may hold all of them.\n{EPILOG}"
    )
