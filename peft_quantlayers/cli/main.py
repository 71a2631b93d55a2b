"""``peft-quantlayers VERB ...``, ``pql VERB ...`` and ``python -m peft_quantlayers VERB ...``: which verb is meant."""

from __future__ import annotations

import importlib
import json
import platform
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

from jsonargparse import Namespace

from ..arguments import nearest
from .parsing import VerbParser, WrongUsage, new_parser, parse, settings_text
from .result import Result
from .run import AUTOLOAD_FOLDER, RUN_HELP, run

PROGRAM = "peft-quantlayers"
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
AUTOLOAD_HELP = f"""Print a folder. In PYTHONPATH it has every Python process import this package as soon as it has
imported transformers:

  export PYTHONPATH="$({PROGRAM} autoload):$PYTHONPATH"

Nothing is installed; without the variable all is as before."""
FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
EPILOG = "exit codes: 0 done, 1 it failed or found damage, 2 wrong usage, 130 interrupted; run: those of the program"
# Packages whose versions are saved beside an output.
VERSIONS_OF = ("peft_quantlayers", "torch", "transformers", "peft", "trl")
# What a user can mend: its message is enough.
EXPECTED = (ValueError, TypeError, OSError, NotImplementedError, ImportError, MemoryError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, ``sys.argv`` if ``arguments`` is None; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_help())
        return 0 if given else WRONG_USAGE
    if given[0] == "--version":
        print(f"{PROGRAM} {_version('peft_quantlayers')}")
        return 0
    verb, *rest = given
    if verb not in VERBS:
        return _said(f"there is no verb {verb!r}{nearest(verb, VERBS)}. {PROGRAM} --help lists them.", WRONG_USAGE)
    if verb in ("run", "autoload"):
        is_help = rest[:1] in (["-h"], ["--help"])
        if verb == "run" and not is_help:
            return run(rest)  # all that follows is the program's
        print((RUN_HELP if verb == "run" else AUTOLOAD_HELP) if is_help else AUTOLOAD_FOLDER)
        return 0
    return run_verb(verb, rest)


def run_verb(verb: str, arguments: Sequence[str]) -> int:
    """Parse, run, print; the exit code."""
    module = importlib.import_module(f"{__package__}.verbs.{verb}")
    parser = verb_parser(verb, module, arguments)
    settings = Namespace(debug="--debug" in arguments)
    try:
        settings = parse(parser, arguments, module.POSITIONALS)
        result = module.run(settings)
        if result is None:  # another process tells
            return 0
        if result.output is not None:
            _save_settings(verb, parser, settings, Path(result.output))
    except WrongUsage as error:
        return _said(f"{verb}: {error}", WRONG_USAGE)
    except KeyboardInterrupt:
        return _said(f"{verb}: interrupted. What was saved before is as it was.", INTERRUPTED)
    except Exception as error:
        return _failed(verb, error, is_debug=settings.debug)
    _print(result, is_json=settings.json)
    return result.exit_code


def verb_parser(verb: str, module: ModuleType, arguments: Sequence[str] = ()) -> VerbParser:
    """The parser of a verb. ``arguments`` may decide which options there are (``train``)."""
    parser = new_parser(f"{PROGRAM} {verb}", module.DESCRIPTION)
    module.add_arguments(parser, arguments) if verb == "train" else module.add_arguments(parser)
    return parser


def _failed(verb: str, error: Exception, *, is_debug: bool) -> int:
    if is_debug:
        traceback.print_exc()
    if isinstance(error, EXPECTED):
        return _said(f"{verb}: {' '.join(str(error).split()) or type(error).__name__}", FAILED)
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return _said(f"{verb}: {said} (unexpected; --debug shows where it came from)", FAILED)


def _save_settings(verb: str, parser: VerbParser, settings: Namespace, folder: Path) -> None:
    """Write the resolved settings and the versions beside the output."""
    versions = ", ".join(f"{name} {_version(name)}" for name in VERSIONS_OF)
    head = f"# {PROGRAM} {verb} {verb}.yaml does the same again.\n# Python {platform.python_version()}, {versions}\n"
    (folder / f"{verb}.yaml").write_text(head + settings_text(parser, settings))


def _print(result: Result, *, is_json: bool) -> None:
    text = json.dumps(result.data, indent=2) if is_json else result.text
    if text:
        print(text)


def _said(message: str, exit_code: int) -> int:
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


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
