"""From a line of arguments, with or without a YAML file, to checked settings.

jsonargparse makes the parsing, the types, the help and the dump of the resolved settings out of one declaration of the
options. Here is what it leaves: positional arguments, names that other trainers use, and messages of one line.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace

from ..arguments import nearest

YAML_SUFFIXES = (".yaml", ".yml", ".json")
# Names that other trainers and quantizers use for the same thing.
ALIASES = {
    "adapter_name_or_path": "adapter",
    "avg_bits": "average_bits",
    "base_model": "model",
    "bits": "nbits",
    "export_dir": "output",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_target_modules": "lora.target_modules",
    "model_name_or_path": "model",
    "output_dir": "output",
    "quantization_bit": "nbits",
}


class WrongUsage(ValueError):
    """The arguments are not those of the verb; the message says which and what was meant."""


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
    named = _with_names(arguments, positionals, known)
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


def _with_names(arguments: Sequence[str], positionals: Sequence[str], known: set[str]) -> list[str]:
    """``arguments`` with names for all that was given without, and our names for those of other programs."""
    rest, named = list(arguments), []
    if rest and not rest[0].startswith("-") and rest[0].endswith(YAML_SUFFIXES):
        named += ["--config", rest.pop(0)]
    for name in positionals:
        if rest and not rest[0].startswith("-"):
            named += [f"--{name}", rest.pop(0)]
    if rest and not rest[0].startswith("-"):
        raise WrongUsage(f"{rest[0]!r} is one argument too many; give options by name, such as --{positionals[0]}.")
    configs = [named[1]] if named[:1] == ["--config"] else []
    for position, argument in enumerate(rest):
        if argument.startswith("--"):
            key, separator, value = argument[2:].partition("=")
            name = _ours(key, known)
            if (
                name not in known
                and key not in ("help", "config", "print_config")
                and not _is_below_a_mapping(name, known)
            ):
                raise WrongUsage(f"there is no option --{key}{_meant(key, known, '--')}. --help lists them all.")
            rest[position] = f"--{name}{separator}{value}"
            if key == "config":
                configs += [value] if separator else rest[position + 1 : position + 2]
    for file in configs:
        checked = _checked_file(file, known)
        if checked != file:
            named[1:2] = [checked]
    return [*named, *rest]


def _ours(key: str, known: set[str]) -> str:
    key = key.replace("-", "_")
    alias = ALIASES.get(key, key)
    return alias if key not in known and alias in known else key


def _is_below_a_mapping(name: str, known: set[str]) -> bool:
    return any(name.startswith(f"{key}.") and not any(other.startswith(f"{key}.") for other in known) for key in known)


def _checked_file(file: str, known: set[str]) -> str:
    """``file``, or the text of its content under our names; WrongUsage where it is none or has an unknown key."""
    path = Path(file)
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise WrongUsage(f"{file} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WrongUsage(f"{file} is no YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise WrongUsage(f"{file} must hold options, one per line (name: value); it holds {type(content).__name__}.")
    for key in _flat(content, known):
        name = _ours(key, known)
        if name not in known and not any(each.startswith(f"{name}.") for each in known):
            raise WrongUsage(f"{file}: unknown key {key!r}{_meant(key, known)}.")
    if any(_ours(key, known) != key for key in content):
        return yaml.safe_dump(_renamed(content, known))
    return file


def _flat(content: Mapping[str, Any], known: set[str], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        is_group = isinstance(value, Mapping) and any(each.startswith(f"{name}.") for each in known)
        if is_group:
            yield from _flat(value, known, f"{name}.")
        else:
            yield name


def _renamed(content: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        *groups, last = _ours(str(key), known).split(".")
        place = found
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = (
            {**place[last], **value} if isinstance(value, dict) and isinstance(place.get(last), dict) else value
        )
    return found


def _meant(key: str, known: set[str], prefix: str = "") -> str:
    found = nearest(key.replace("-", "_"), sorted(known))
    return found.replace("mean '", f"mean '{prefix}") if found else ""


def _in_one_line(message: str, known: set[str]) -> str:
    """jsonargparse's message without its layers of reasons."""
    option = re.search(r'Parser key "([^"]+)"', message)
    value = re.search(r"(?:Given|Got) value: (.*)", message)
    expected = dict.fromkeys(re.findall(r"Expected an? <class '(\w+)'>", message))
    expected.pop("NoneType", None)
    if option and value and expected:
        return f"{option[1]}={value[1]!r}: expected {' or '.join(expected)}."
    if unknown := re.search(r"unrecognized arguments: (\S+)", message):
        return f"there is no option {unknown[1]}{_meant(unknown[1].lstrip('-'), known, '--')}. --help lists them all."
    if missing := re.search(r"the following arguments are required: (.*)", message):
        return f"{missing[1]} must be given: on the line (--{missing[1].split(',')[0]} ...), or in the YAML file."
    return " ".join(message.split())
