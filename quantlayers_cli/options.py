"""The options of every verb as ``options.json`` lists them: help, and names that there are not."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from .option_names import with_names

PROGRAM = "peft-quantlayers"
EPILOG = "exit codes: 0 done, 1 it failed or found damage, 2 wrong usage, 130 interrupted; run: those of the program"
OPTIONS = Path(__file__).with_name("options.json")

# Packages with this entry point bring methods, whose fields are options that the file does not list.
METHODS_OF_OTHERS = "peft_quantlayers.methods"
# Where descriptions of options begin.
INDENT = 24
ALL_OPTIONS = "--help_all"
OF_OTHERS = {
    "train": "--lora.NAME takes every field of PEFT's LoraConfig, and --training.NAME every field of TRL's SFTConfig, "
    "or of its DPOConfig with --trainer dpo; --merge_options.NAME, --evaluate_options.NAME and --export_options.NAME "
    f"take the options of these verbs. `{PROGRAM} train {ALL_OPTIONS}` lists all that are installed, which takes "
    "seconds.",
}


def help_text(verb: str, width: int | None = None) -> str:
    """What a verb does and its options, in lines of ``width`` characters; None: of the terminal."""
    width = shutil.get_terminal_size().columns - 2 if width is None else width
    verb_of = _verbs()[verb]
    places = " ".join(
        name.upper() if name in verb_of["required"] else f"[{name.upper()}]" for name in verb_of["positionals"]
    )
    parts = [
        textwrap.fill(f"usage: {PROGRAM} {verb} [config.yaml] {places} [--option value ...]", width),
        textwrap.fill(verb_of["description"], width),
        f"options:\n{listed(verb, width)}",
        *([textwrap.fill(OF_OTHERS[verb], width)] if verb in OF_OTHERS else []),
        EPILOG,
    ]
    return "\n\n".join(parts)


def listed(verb: str, width: int) -> str:
    """The options of a verb, in lines of ``width`` characters."""
    lines = []
    for name, text in _verbs()[verb]["options"].items():
        first, *others = textwrap.wrap(text, max(width - INDENT, 20))
        head = f"  {name}"
        lines += [f"{head:{INDENT}}{first}"] if len(head) <= INDENT - 2 else [head, " " * INDENT + first]
        lines += [" " * INDENT + line for line in others]
    return "\n".join(lines)


def description(verb: str) -> str:
    """What a verb does."""
    return _verbs()[verb]["description"]


def option_name(shown: str) -> str:
    """``model`` of ``--model MODEL``."""
    return shown.split()[0].rstrip(",").removeprefix("--")


def check_names(verb: str, arguments: Sequence[str]) -> None:
    """Raise WrongUsage for an option or a key that no verb has, or a required one that is missing.

    Names of fields of other packages' classes (``OF_OTHERS``) and of their methods are left to the full parser.
    """
    if ALL_OPTIONS in arguments or entry_points(group=METHODS_OF_OTHERS):
        return
    with_names(arguments, _verbs()[verb]["positionals"], listed_names(verb), _verbs()[verb]["required"])


def listed_names(verb: str) -> set[str]:
    """The options of a verb, and the groups of those that the file does not list."""
    return {*map(option_name, _verbs()[verb]["options"]), *_verbs()[verb]["groups_of_others"]}


@cache
def _verbs() -> dict[str, Any]:
    return json.loads(OPTIONS.read_text(encoding="utf-8"))
