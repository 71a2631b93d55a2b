"""A verb that has work to do: its full parser, its settings, its result. ``quantlayers_cli.main`` calls this."""

from __future__ import annotations

import importlib
import json
import platform
import shutil
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

from jsonargparse import Namespace
from safetensors import SafetensorError
from tqdm import tqdm

from quantlayers_cli.main import FAILED, INTERRUPTED, WRONG_USAGE, said
from quantlayers_cli.names import WrongUsage
from quantlayers_cli.options import ALL_OPTIONS, PROGRAM

from .parsing import VerbParser, new_parser, parse, settings_text
from .result import Result

# Packages whose versions are saved beside an output.
VERSIONS_OF = ("peft_quantlayers", "torch", "transformers", "peft", "trl")
# What a user can mend: its message is enough.
EXPECTED = (ValueError, TypeError, OSError, NotImplementedError, ImportError, MemoryError, SafetensorError)
# A file system with less is full: a file that failed half-written is gone again by now.
FULL = 2**20


def run_verb(verb: str, arguments: Sequence[str]) -> int:
    """Parse, run, print; the exit code."""
    arguments = ["--help" if each == ALL_OPTIONS else each for each in arguments]
    settings = Namespace(debug="--debug" in arguments)
    try:
        module = importlib.import_module(f"{__package__}.verbs.{verb}")
        parser = verb_parser(verb, module, arguments)
        settings = parse(parser, arguments, module.POSITIONALS)
        result = module.run(settings)
        if result is None:  # another process tells
            return 0
        if result.output is not None:
            _save_settings(verb, parser, settings, Path(result.output))
        _print(result, is_json=settings.json)
    except WrongUsage as error:
        return _said(f"{verb}: {error}", WRONG_USAGE)
    except KeyboardInterrupt:
        return _said(f"{verb}: interrupted. What was saved before is as it was.", INTERRUPTED)
    except Exception as error:
        return _failed(verb, error, is_debug=settings.debug, output=getattr(settings, "output", None))
    return result.exit_code


def verb_parser(verb: str, module: ModuleType, arguments: Sequence[str] = ()) -> VerbParser:
    """The parser of a verb. ``arguments`` may decide which options there are (``train``)."""
    parser = new_parser(f"{PROGRAM} {verb}", module.DESCRIPTION)
    module.add_arguments(parser, arguments) if verb == "train" else module.add_arguments(parser)
    return parser


def _said(message: str, exit_code: int) -> int:
    """As :func:`said`, on a line of its own also where a progress bar stands."""
    with tqdm.external_write_mode(file=sys.stderr):
        return said(message, exit_code)


def _failed(verb: str, error: Exception, *, is_debug: bool, output: str | None) -> int:
    if is_debug:
        traceback.print_exc()
    if output is not None and _is_full(Path(output)):  # which packages tell in words of their own, if at all
        return _said(f"{verb}: the disk of {output} is full. {_in_one_line(error)}", FAILED)
    if isinstance(error, EXPECTED):
        return _said(f"{verb}: {_in_one_line(error)}", FAILED)
    message = " ".join(f"{type(error).__name__}: {error}".split())
    return _said(f"{verb}: {message} (unexpected; --debug shows where it came from)", FAILED)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _is_full(output: Path) -> bool:
    place = next((place for place in (output, *output.parents) if place.exists()), None)
    usage = None if place is None else shutil.disk_usage(place)
    return usage is not None and usage.total > 0 and usage.free < FULL


def _save_settings(verb: str, parser: VerbParser, settings: Namespace, folder: Path) -> None:
    """Write the resolved settings and the versions beside the output."""
    versions = ", ".join(f"{name} {_version(name)}" for name in VERSIONS_OF)
    head = f"# {PROGRAM} {verb} {verb}.yaml does the same again.\n# Python {platform.python_version()}, {versions}\n"
    (folder / f"{verb}.yaml").write_text(head + settings_text(parser, settings), encoding="utf-8")


def _print(result: Result, *, is_json: bool) -> None:
    text = json.dumps(result.data, indent=2) if is_json else result.text
    if text:
        print(text, flush=True)  # so that a pipe that is closed, or a full disk, is an error of this verb


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
