"""From a line of arguments, with or without a YAML file, to checked settings.

jsonargparse makes the parsing, the types, the help and the dump of the resolved settings out of one declaration of the
options. Here is what it leaves, next to the names (``quantlayers_cli.option_names``): messages of one line.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace

from quantlayers_cli.option_names import WrongUsage, meant, with_names
from quantlayers_cli.spelling import nearest

# Groups of options that are fields of other packages' classes, which may be empty.
GROUPS_OF_OTHERS = ("lora", "training")


class VerbParser(ArgumentParser):
    """The parser of one verb.

    Attributes:
        without_default: names of options that leave nothing in the settings where they are not given.
    """

    def __init__(self, **options: Any) -> None:
        self.without_default: set[str] = set()
        super().__init__(**options)

    def add_argument(self, *names: Any, **options: Any) -> Any:
        """As everywhere, and a flag may have a value, as in a file: ``--overwrite false``."""
        if options.get("action") == "store_true":
            options = {**options, "nargs": "?", "type": bool, "default": False, "const": True}
            del options["action"]
        return super().add_argument(*names, **options)

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
    # jsonargparse names what a dataclass of PEFT's may hold below init_args, and writes and reads it without.
    known = parser.names() | {name.replace(".init_args.", ".") for name in parser.names()}
    named = with_names(arguments, positionals, known)
    try:
        settings = parser.parse_args(named)
    except ArgumentError as error:
        raise WrongUsage(_in_one_line(str(error), known)) from None
    _check_values(parser, settings)
    return settings


def _check_values(parser: VerbParser, settings: Namespace) -> None:
    """Raise WrongUsage for names of nothing.

    An option that is empty is often a variable of the shell that is not set: ``pql quantize "$MODEL" out``.
    """
    for name in sorted(parser.names()):
        value = settings.get(name)
        if isinstance(value, str) and name.partition(".")[0] not in GROUPS_OF_OTHERS:
            if not value.strip() and name != "prompt":
                raise WrongUsage(f"--{name} is empty. Give it a value, or leave it out.")
            if "\0" in value:
                raise WrongUsage(f"--{name} {value!r} holds the character 0, which no name can.")


def yaml_text(value: Any) -> str:
    """``value`` as YAML in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


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
    expected = dict.fromkeys(re.findall(r"Expected (?:an? )?<class '(\w+)'>", message))
    expected.pop("NoneType", None)
    choices = re.search(r"Expected an? typing\.Literal\[(.*?)\]", message)
    if option and value and choices:
        names = re.findall(r"'([^']*)'", choices[1])
        listed = ", ".join([*(name.replace("bool", "true, false") for name in expected), *names])
        return f"{option[1]}={value[1]!r}: choose one of {listed}{nearest(value[1], names)}."
    if option and value and "list" in expected:
        return f"{option[1]}={value[1]!r}: expected a list: --{option[1]} '[{value[1].rstrip('.')}]'."
    if option and value and expected:
        types = " or ".join(name.replace("bool", "true or false") for name in expected)
        return f"{option[1]}={value[1]!r}: expected {types}."
    if unknown := re.search(r"unrecognized arguments: (\S+)", message):
        return f"there is no option {unknown[1]}{meant(unknown[1].lstrip('-'), known, '--')}. --help lists them all."
    return " ".join(message.split())
