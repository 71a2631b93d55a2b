"""The names of options: positional arguments get theirs, those of other trainers become ours, others are refused."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from .spelling import nearest

YAML_SUFFIXES = (".yaml", ".yml", ".json")
# Fields of TRL's and PEFT's classes that are also understood without the group that they are in.
OF_TRAINING = (
    "assistant_only_loss", "bf16", "completion_only_loss", "eval_steps", "eval_strategy", "fp16",
    "gradient_accumulation_steps", "gradient_checkpointing", "learning_rate", "logging_steps", "lr_scheduler_type",
    "max_grad_norm", "max_length", "max_steps", "neftune_noise_alpha", "num_train_epochs", "optim", "packing",
    "per_device_eval_batch_size", "per_device_train_batch_size", "report_to", "resume_from_checkpoint", "save_steps",
    "save_strategy", "save_total_limit", "seed", "warmup_ratio", "warmup_steps", "weight_decay",
)  # fmt: skip
OF_LORA = (
    "init_lora_weights", "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "modules_to_save",
    "target_modules", "use_dora", "use_qalora", "use_rslora",
)  # fmt: skip
# Names that other trainers and quantizers use for the same thing: of ours the first that a verb has.
ALIASES: dict[str, tuple[str, ...]] = {
    **{name: (f"training.{name}",) for name in OF_TRAINING},
    **{name: (f"lora.{name}",) for name in OF_LORA},
    **dict.fromkeys(("bits", "nbits", "quant_bits", "quantization_bit", "wbits"), ("nbits", "quantization.nbits")),
    **dict.fromkeys(("group_size", "groupsize"), ("group_size", "quantization.group_size")),
    **dict.fromkeys(("cutoff_len", "max_seq_length", "sequence_len"), ("training.max_length",)),
    **dict.fromkeys(("eval_dataset", "val_dataset"), ("eval_data",)),
    **dict.fromkeys(("lora_target", "lora_target_modules"), ("lora.target_modules",)),
    "adapter_name_or_path": ("adapter",),
    "avg_bits": ("average_bits",),
    "base_model": ("model",),
    "dataset": ("data",),
    "export_dir": ("export_output", "output"),
    "lora_model_dir": ("adapter",),
    "lora_r": ("lora.r",),
    "lora_rank": ("lora.r",),
    "lr_scheduler": ("training.lr_scheduler_type",),
    "lr": ("training.learning_rate",),
    "micro_batch_size": ("training.per_device_train_batch_size",),
    "model_name_or_path": ("model",),
    "nproc": ("n_processes",),
    "optimizer": ("training.optim",),
    "num_epochs": ("training.num_train_epochs",),
    "output_dir": ("output",),
    "quant_method": ("method", "quantization.method"),
    "sample_packing": ("training.packing",),
}
# Words that YAML reads as true and false, by the options that mean the word.
NO: dict[bool, str | None] = {False: "no"}
WORDS: dict[str, dict[bool, str | None]] = {
    "merge": {False: None},
    "training.eval_strategy": NO,
    "training.logging_strategy": NO,
    "training.resume_from_checkpoint": {True: "true", False: None},
    "training.save_strategy": NO,
}
# Options that every parser has by itself.
OF_PARSERS = ("help", "config", "print_config")


class WrongUsage(ValueError):
    """The arguments are not those of the verb; the message says which and what was meant."""


def with_names(
    arguments: Sequence[str], positionals: Sequence[str], known: set[str], required: Collection[str] = ()
) -> list[str]:
    """``arguments`` with names for all that was given without, and our names for those of other programs.

    Args:
        arguments: after the verb.
        positionals: options that may be given without their name, in this order; before them a YAML file may stand.
        known: names of all options, those in groups with dots.
        required: those that must be given, on the line or in a file.

    Raises:
        WrongUsage: an unknown option or key, a required one that is missing, a file that cannot be read.
    """
    rest, named = list(arguments), []
    if rest and not rest[0].startswith("-") and rest[0].lower().endswith(YAML_SUFFIXES):
        named += ["--config", rest.pop(0)]
    for name in _names_of_positionals(rest, positionals, named[1:], known):
        if rest and not rest[0].startswith("-"):
            named += [f"--{name}", rest.pop(0)]
    if rest and not rest[0].startswith("-"):
        raise WrongUsage(f"{rest[0]!r} is one argument too many; give options by name, such as --{positionals[0]}.")
    # Where the YAML files are named: a list, the place in it, and what stands before the file there.
    configs = [(named, 1, "")] if named[:1] == ["--config"] else []
    for position, argument in enumerate(rest):
        if argument.startswith("--"):
            key, separator, value = argument[2:].partition("=")
            name = _ours(key, known)
            if name not in known and key not in OF_PARSERS and not _is_below_a_mapping(name, known):
                raise WrongUsage(f"there is no option --{key}{meant(key, known, '--')}. --help lists them all.")
            rest[position] = f"--{name}{separator}{value}"
            if key == "config" and separator:
                configs.append((rest, position, "--config="))
            elif key == "config" and position + 1 < len(rest):
                configs.append((rest, position + 1, ""))
    given = {each[2:].partition("=")[0] for each in (*named, *rest) if each.startswith("--")}
    for arguments, place, before in configs:
        content = _content_of(arguments[place].removeprefix(before), known)
        given |= {_ours(key, known) for key, _ in _flat(content, known)}
        renamed = _renamed(_in_words(content, known), known)
        if renamed != content:
            arguments[place] = before + yaml.safe_dump(renamed)
    if missing := [name for name in required if not {name, "print_config"} & given]:
        raise WrongUsage(
            f"{', '.join(missing)} must be given: on the line (--{missing[0]} ...), or in the YAML file. "
            "Without names they come before all options; --help lists these."
        )
    return [*named, *rest]


def _names_of_positionals(
    rest: Sequence[str], positionals: Sequence[str], files: Sequence[str], known: set[str]
) -> Sequence[str]:
    """What arguments without names are: what neither a file nor the line gives, if that is enough, or all in order.

    Where there are fewer of them, an adapter that is given stands for its model.
    """
    given = {_ours(each[2:].partition("=")[0], known) for each in rest if each.startswith("--")}
    given |= {_ours(key, known) for file in files for key in _content_of(file, known)}
    left = [name for name in positionals if name not in given]
    n_bare = next((at for at, each in enumerate(rest) if each.startswith("-")), len(rest))
    if "adapter" in given and n_bare < len(left):
        left = [name for name in left if name != "model"]
    return left if n_bare <= len(left) else positionals


def meant(key: str, known: set[str], prefix: str = "") -> str:
    """``" (did you mean ...?)"`` with the known name that is spelled nearly like ``key``, or nothing."""
    others = {alias for alias in ALIASES if _ours(alias, known) in known}
    found = nearest(key.replace("-", "_"), sorted(known | others))
    return found.replace("mean '", f"mean '{prefix}") if found else ""


def _ours(key: str, known: set[str]) -> str:
    key = key.replace("-", "_")
    names = () if key in known else ALIASES.get(key, ())
    return next((name for name in names if name in known or _is_below_a_mapping(name, known)), key)


def _is_below_a_mapping(name: str, known: set[str]) -> bool:
    return any(name.startswith(f"{key}.") and not any(other.startswith(f"{key}.") for other in known) for key in known)


def _content_of(file: str, known: set[str]) -> dict[str, Any]:
    """What a YAML file holds; WrongUsage where it is none, or has an unknown key or one that is there twice."""
    content = read_options(file)
    names: dict[str, str] = {}
    for key, value in _flat(content, known):
        name = _ours(key, known)
        if not (name in known or _is_below_a_mapping(name, known) or _is_group(name, known)):
            raise WrongUsage(f"{file}: unknown key {key!r}{meant(key, known)}.")
        if name not in known and _is_group(name, known) and value is not None:
            raise WrongUsage(f"{file}: {key} holds options, one per line below it (name: value); it holds {value!r}.")
        if name in names:
            raise WrongUsage(f"{file}: {names[name]!r} and {key!r} are the same option. Leave one of them.")
        names[name] = key
    return content


def read_options(file: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises WrongUsage where it cannot be read, or is none, or has a key twice."""
    try:
        content = copy.deepcopy(_parsed(Path(file).read_text(encoding="utf-8")))
    except OSError as error:
        raise WrongUsage(f"{file} cannot be read: {error.strerror}.") from None
    except _KeyTwice as error:
        raise WrongUsage(f"{file}: {error}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise WrongUsage(f"{file} is no YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        held = "nothing" if content is None else f"a {type(content).__name__}"
        raise WrongUsage(f"{file} must hold options, one per line (name: value); it holds {held}.")
    return content


@cache
def _parsed(text: str) -> Any:
    """The content of YAML; a file is read by the names, by the options of its verb and by their values."""
    return yaml.load(text, _EachKeyOnce)


class _KeyTwice(yaml.YAMLError):
    """A key is there twice."""


class _EachKeyOnce(yaml.SafeLoader):
    """YAML in which a key that is there twice is an error: the first one would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise _KeyTwice(f"{key.value!r} is in line {lines[key.value]} and in line {line}. Leave one of them")
            lines[key.value if isinstance(key, yaml.ScalarNode) else ""] = line
        return super().construct_mapping(node, deep)


def _is_group(name: str, known: set[str]) -> bool:
    return any(each.startswith(f"{name}.") for each in known)


def _is_empty_group(name: Any, value: Any, known: set[str]) -> bool:
    """Whether nothing is given of a group."""
    return value is None and name not in known and _is_group(str(name), known)


def _flat(content: Mapping[str, Any], known: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The options of a file, with the names of their groups, and their values."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and _is_group(name, known):
            yield from _flat(value, known, f"{name}.")
        else:
            yield name, value


def _in_words(content: Mapping[str, Any], known: set[str], prefix: str = "") -> dict[str, Any]:
    """``content`` with the words of ``WORDS`` where YAML has made true or false of them."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = _ours(f"{prefix}{key}", known)
        if isinstance(value, Mapping) and _is_group(name, known):
            found[key] = _in_words(value, known, f"{name}.")
        else:
            found[key] = WORDS[name].get(value, value) if isinstance(value, bool) and name in WORDS else value
    return found


def _renamed(content: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        if _is_empty_group(key, value, known):
            continue
        *groups, last = _ours(str(key), known).split(".")
        place = found
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = (
            {**place[last], **value} if isinstance(value, dict) and isinstance(place.get(last), dict) else value
        )
    return found
