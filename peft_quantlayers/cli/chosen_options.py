"""Options that decide which others a verb has, read before its parser is complete."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import yaml

from quantlayers_cli.option_names import WrongUsage, read_options, with_names
from quantlayers_cli.options import listed_names

from .models import is_adapter


def chosen_options(verb: str, arguments: Sequence[str], positionals: Sequence[str], **defaults: str) -> dict[str, str]:
    """Options on the line, else in the YAML file, else their ``defaults``, before the parser is complete.

    ``model`` and ``adapter`` are among them where they are given.
    """
    if not arguments:
        return defaults
    with suppress(WrongUsage):  # the parser says what is wrong
        arguments = with_names(arguments, positionals, listed_names(verb))
    found: dict[str, str] = {}
    on_line: dict[str, str] = {}
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, separator, value = argument.removeprefix("--").partition("=")
        value = value if separator else following
        if argument == "--config" or argument.startswith("--config="):
            content = yaml.safe_load(value) if "\n" in value else _content_of(value)
            found |= {name: str(each) for name, each in content.items() if each is not None}
        elif argument.startswith("--"):
            on_line[name] = value
    wanted = {*defaults, "model", "adapter"}
    return defaults | {name: value for name, value in (found | on_line).items() if name in wanted}


def _content_of(file: str) -> dict[str, Any]:
    try:
        return read_options(file)
    except WrongUsage:  # the parser says what is wrong with it
        return {}


def chosen_adapter(chosen: dict[str, str]) -> str | None:
    """The adapter that is trained on, by its own option or in the place of a model."""
    if "adapter" in chosen:
        return chosen["adapter"]
    return chosen["model"] if is_adapter(chosen.get("model", "")) else None
