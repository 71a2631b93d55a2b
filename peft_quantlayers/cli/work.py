"""A verb that has work to do: its full parser, its settings, its result. ``quantlayers_cli.main`` calls this."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from types import ModuleType

from jsonargparse import Namespace
from safetensors import SafetensorError
from tqdm import tqdm

from quantlayers_cli.by_module import is_first_process
from quantlayers_cli.main import FAILED, INTERRUPTED, WRONG_USAGE, said
from quantlayers_cli.option_names import WrongUsage
from quantlayers_cli.options import ALL_OPTIONS, PROGRAM

from ..storage import is_full, says_full
from .in_options import in_options
from .parsing import VerbParser, new_parser, parse
from .result import Result
from .saved_settings import save_settings

# What a user can mend: its message is enough.
EXPECTED = (ValueError, TypeError, OSError, NotImplementedError, ImportError, MemoryError, SafetensorError)


# As torch says it where the memory of a machine or of a device is not enough.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")


def run_verb(verb: str, arguments: Sequence[str]) -> int:
    """Parse, run, print; the exit code."""
    arguments = ["--help" if each == ALL_OPTIONS else each for each in arguments]
    settings = Namespace(debug="--debug" in arguments)
    try:
        module = importlib.import_module(f"{__package__}.verbs.{verb}")
        parser = verb_parser(verb, module, arguments)
        settings = parse(parser, arguments, module.POSITIONALS)
        # What packages print is no part of the JSON.
        with redirect_stdout(sys.stderr) if settings.json else nullcontext():
            result = module.run(settings)
        if result is None:  # another process tells
            return 0
        if result.output is not None:
            save_settings(verb, parser, settings, Path(result.output), name=result.settings_name)
        _print(result, is_json=settings.json)
    except WrongUsage as error:
        return _said(f"{verb}: {_in_one_line(error)}{_notes(error)}", WRONG_USAGE)
    except BrokenPipeError:  # who reads what is printed has enough
        raise
    except KeyboardInterrupt as interrupt:
        if is_first_process():
            _said(f"{verb}: interrupted. What was saved before is as it was.{_notes(interrupt)}", INTERRUPTED)
        return INTERRUPTED
    except Exception as error:
        if settings.debug:
            traceback.print_exc()
        reason = _full_disk(error, getattr(settings, "output", None)) or _reason(error)
        return _said(f"{verb}: {reason}{_notes(error)}", FAILED)
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


def _reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY):
        reason = str(error).split("Error code")[0].split(". GPU")[0].rpartition("err == 0. ")[2]
        return f"there is not enough memory ({' '.join(reason.split())}). `{PROGRAM} estimate` says what a step takes."
    is_sentence = isinstance(error, KeyError) and " " in str(error)
    if isinstance(error, EXPECTED) or is_sentence:
        return _in_one_line(error)
    return " ".join(f"{type(error).__name__}: {error} (unexpected; --debug shows where it came from)".split())


def _notes(error: BaseException) -> str:
    """What was noted on the way: what is kept, where to go on. Nothing that the message says already."""
    said = str(error).lower()
    notes = getattr(error, "__notes__", ())
    if "nothing was " in said:
        notes = [note for note in notes if not note.startswith("Nothing was ")]
    return "".join(f" {in_options(note)}" for note in notes)


def _full_disk(error: Exception, output: str | None) -> str | None:
    """What to say where ``error`` comes of a full disk, which packages tell in words of their own, if at all."""
    is_told = says_full(error)
    if not is_told and (output is None or isinstance(error, EXPECTED) or not is_full(Path(output))):
        return None
    place = error.filename if isinstance(error, OSError) else None
    is_of_system = not isinstance(error, OSError) or error.strerror in (None, os.strerror(error.errno or 0))
    if not is_of_system or (place is None and output is None):  # our own sentence names the place, and what is kept
        return _in_one_line(error)
    return f"the disk of {place or output} is full ({_in_one_line(error).rstrip('.')}). Free some space."


def _in_one_line(error: BaseException) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).partition(
        "Exception raised from"
    )[0]  # before the frames of torch's C++
    if isinstance(error, OSError) and error.strerror:  # without its number
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}."
    text = in_options(" ".join(text.split())) or type(error).__name__
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _print(result: Result, *, is_json: bool) -> None:
    text = json.dumps(result.data, indent=2) if is_json else result.text
    if text:
        print(text, flush=True)  # so that a pipe that is closed, or a full disk, is an error of this verb
