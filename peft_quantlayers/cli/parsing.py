"""From a line of arguments, with or without a YAML file, to checked settings.

jsonargparse makes the parsing, the types, the help and the dump of the resolved settings out of one declaration of the
options. Here is what it leaves, next to the names (``quantlayers_cli.names``): messages of one line.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace

from quantlayers_cli.names import WrongUsage, meant, with_names


class VerbParser(ArgumentParser):
    """The parser of one verb.

    Attributes:
        without_default: names of options that leave nothing in the settings where they are not given.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.without_default: set[str] = set()

    def add_without_default(self, name: str, **options: Any) -> None:
        """Add ``--name``, which has no default."""
        self.without_default.add(name)
        self.add_argument(f"--{name}", default=argparse.SUPPRESS, **options)

    def names(self) -> set[str]:
        """The names of all options, those in groups with dots."""
        return {*self.get_defaults(skip_validation=True).keys(), *self.without_default} - {"config"}


def new_parser(prog: str, description: str) -> VerbParser:
    """An empty parser of one verb, with the options that all have."""
    parser = VerbParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file with any of these options; also given first"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--debug", action="store_true", help="show where in the code an error came from")
    return parser


def parse(parser: VerbParser, arguments: Sequence[str], positionals: Sequence[str]) -> Namespace:
    """The settings that ``arguments`` give.

    Args:
        parser: of the verb.
        arguments: after the verb.
        positionals: options that may be given without their name, in this order; before them a YAML file may stand.

    Raises:
        WrongUsage: an unknown option or key, a value of the wrong type, a required one that is missing.
    """
    known = parser.names()
    named = with_names(arguments, positionals, known)
    try:
        settings = parser.parse_args(named)
    except ArgumentError as error:
        raise WrongUsage(_in_one_line(str(error), known)) from None
    return settings


def settings_text(parser: ArgumentParser, settings: Namespace) -> str:
    """The resolved settings as YAML, which the same verb takes again."""
    shown = settings.clone()
    for name in ("config", "json", "debug", "dry_run"):
        shown.pop(name, None)
    return parser.dump(shown, skip_validation=True)


def _in_one_line(message: str, known: set[str]) -> str:
    """jsonargparse's message without its layers of reasons."""
    option = re.search(r'Parser key "([^"]+)"', message)
    value = re.search(r"(?:Given|Got) value: (.*)", message)
    expected = dict.fromkeys(re.findall(r"Expected an? <class '(\w+)'>", message))
    expected.pop("NoneType", None)
    if option and value and expected:
        return f"{option[1]}={value[1]!r}: expected {' or '.join(expected)}."
    if unknown := re.search(r"unrecognized arguments: (\S+)", message):
        return f"there is no option {unknown[1]}{meant(unknown[1].lstrip('-'), known, '--')}. --help lists them all."
    return " ".join(message.split())
