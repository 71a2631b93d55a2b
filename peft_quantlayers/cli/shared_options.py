"""Options that several verbs have: the fields of methods, calibration, where a model is and where it goes."""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from quantlayers_cli.option_names import WrongUsage

from ..bit_allocation import BitPlan
from ..bit_allocation.bit_plan import bytes_of_size
from ..bit_allocation.plan_bits import fields_of_choices
from ..calibration import Calibration
from ..methods import QuantConfig, config_type, registered_methods
from ..storage.full_disk import NO_SPACE
from .field_help import field_help
from .parsing import VerbParser
from .read_data import DATA_HELP, load_texts
from .refused_values import values_refused

PLAN_FILE = "bit_plan.json"
# Options that name folders which are read.
INPUTS = ("model", "adapter", "float_model", "reference", "folder")
DTYPES = Literal["auto", "float32", "bfloat16", "float16"]


def add_model(parser: ArgumentParser, *, required: bool = True) -> None:
    """``--model``, ``--tokenizer``, ``--dtype`` and ``--device``."""
    help_text, tokenizer_of = "folder of a model, or its name on the Hub", "the model's"
    if required:
        parser.add_argument("--model", type=str, required=True, help=help_text)
    else:
        parser.add_argument("--model", type=str | None, default=None, help=f"{help_text}; null: the adapter's base")
        tokenizer_of = "the adapter's, or the model's"
    parser.add_argument("--tokenizer", type=str | None, default=None, help=f"its folder or name; null: {tokenizer_of}")
    parser.add_argument("--dtype", type=DTYPES, default="auto", help="of float weights; auto: as the files have them")
    parser.add_argument(
        "--device", type=str | None, default=None, help="where to compute, such as cuda; null: the CPU"
    )


def add_output(parser: ArgumentParser, *, help_text: str = "folder to write; it must not exist, or be empty") -> None:
    """``--output``, ``--overwrite`` and ``--dry_run``."""
    parser.add_argument("--output", type=str, required=True, help=help_text)
    parser.add_argument("--overwrite", action="store_true", help="replace the model in --output")
    add_dry_run(parser)


def add_dry_run(parser: ArgumentParser) -> None:
    """``--dry_run``."""
    parser.add_argument(
        "--dry_run", action="store_true", help="say what would be done and what it takes; write nothing"
    )


def check_pattern(option: str, value: Any) -> None:
    """Raise WrongUsage where a text is no regular expression, which PEFT takes it for."""
    try:
        re.compile(value if isinstance(value, str) else "")
    except re.error as error:
        raise WrongUsage(
            f"--{option} {value!r} is no regular expression ({error}). Give a list of names: [q_proj, v_proj]."
        ) from None


def check_output(
    settings: Namespace,
    folder: Path | None = None,
    *,
    option: str = "output",
    is_adapter: bool = False,
    inputs: Sequence[str] = (),
) -> None:
    """Raise an error where ``folder``, or that of ``option``, cannot be written, or is one of those that are read.

    Raises:
        NotADirectoryError: it is a file, or lies in one.
        PermissionError: it cannot be written.
        FileExistsError: it holds what is read, or an adapter where a model is written and the other way round.
    """
    folder = Path(settings[option]) if folder is None else folder
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--{option} {folder} is a file. Name a folder.")
    check_place(option, folder)
    for given in filter(None, (*inputs, *map(settings.get, INPUTS))):
        if Path(given).expanduser().is_dir() and Path(given).expanduser().resolve() == folder.resolve():
            raise FileExistsError(f"--{option} {folder} is read, and would be replaced. Choose another folder.")
    other, meant = ("config.json", "a model") if is_adapter else ("adapter_config.json", "an adapter")
    if (folder / other).is_file():
        raise FileExistsError(
            f"--{option} {folder} holds {meant} ({other}): a model and an adapter in one folder are loaded together. "
            "Choose another folder."
        )


def check_place(option: str, path: Path) -> None:
    """Raise an error where ``path`` cannot be made: NotADirectoryError below a file, PermissionError, OSError."""
    try:
        above = next(each for each in (path, *path.absolute().parents) if each.exists())
        if above != path and not above.is_dir():
            raise NotADirectoryError(f"--{option} {path} cannot be made: {above} is a file. Choose another place.")
        if not os.access(above if above.is_dir() else above.parent, os.W_OK):
            raise PermissionError(f"--{option} {path} cannot be written: there is no permission in {above}.")
        with tempfile.TemporaryFile(dir=above if above.is_dir() else above.parent):  # which systems may refuse anyway
            pass
    except OSError as error:
        if error.errno is None or error.errno in NO_SPACE:  # ours, or what the work says with what it needs
            raise
        raise OSError(f"--{option} {path} cannot be made: {error.strerror}. Choose another place.") from None


def refuse_output_in_use(settings: Namespace, *, way_out: str = "", option: str = "output") -> None:
    """Raise FileExistsError before hours of work, if the folder of ``option``, which was checked, holds files."""
    folder = Path(settings[option])
    if folder.exists() and any(folder.iterdir()) and not settings.overwrite:
        raise FileExistsError(
            f"--{option} {folder} is not empty. Choose another folder, or replace what is in it: --overwrite{way_out}."
        )


def add_method(parser: VerbParser, prefix: str = "") -> None:
    """``--method`` and the fields of all registered methods, each without a default: the method's own holds."""
    configs = _configs()
    parser.add_argument(f"--{prefix}method", type=Literal[tuple(configs)], default="hqq", help="how to quantize")
    hints: dict[str, Any] = {}
    texts: dict[str, str] = {}
    defaults: dict[str, list[str]] = {}
    for method, config in configs.items():
        types, help_of = get_type_hints(config), field_help(config)
        for field in dataclasses.fields(config):
            hints[field.name] = types[field.name] | hints[field.name] if field.name in hints else types[field.name]
            texts.setdefault(field.name, help_of.get(field.name, ""))
            defaults.setdefault(field.name, []).append(f"{method} {field.default}")
    for name, hint in hints.items():
        own = defaults[name]
        values = {text.partition(" ")[2] for text in own}
        shown = values.pop() if len(values) == 1 and len(own) == len(configs) else ", ".join(own)
        parser.add_without_default(f"{prefix}{name}", type=_from_yaml(hint), help=f"{texts[name]} [{shown}]")


def method_config(settings: Namespace) -> QuantConfig:
    """The config that the options of :func:`add_method` make. Raises WrongUsage for what the config refuses."""
    config: Any = _configs()[settings.method]
    given = given_fields(settings)
    with values_refused():
        return config(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})


def given_fields(settings: Namespace) -> dict[str, Any]:
    """The fields of methods that were given, by name."""
    names = {field.name for config in _configs().values() for field in dataclasses.fields(config)}
    return {name: value for name, value in vars(settings).items() if name in names}


def resolve_method(settings: Namespace, config: QuantConfig) -> None:
    """Put every field of ``config`` into the settings, which are saved: a default may be another one later."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        settings[field.name] = list(value) if isinstance(value, tuple) else value


def add_calibration(parser: ArgumentParser) -> None:
    """``--calibration.data`` and the other fields of a :class:`Calibration`."""
    hints, texts = get_type_hints(Calibration), field_help(Calibration)
    parser.add_argument(
        "--calibration.data", type=str | None, default=None, help=f"{DATA_HELP}; null: without calibration"
    )
    for field in dataclasses.fields(Calibration):
        if field.name not in ("data", "tokenizer"):
            hint = str | None if field.name == "resume_folder" else hints[field.name]
            parser.add_argument(
                f"--calibration.{field.name}", type=hint, default=field.default, help=texts.get(field.name, "")
            )


def check_calibration(settings: Namespace) -> None:
    """Raise WrongUsage for options of a calibration without data, which would be ignored."""
    if settings.calibration.data is not None:
        return
    for field in dataclasses.fields(Calibration):
        if field.name not in ("data", "tokenizer") and settings.calibration[field.name] != field.default:
            raise WrongUsage(
                f"--calibration.{field.name} is for a calibration, which needs --calibration.data. Give that too, or "
                "leave it out."
            )


def calibration(settings: Namespace, tokenizer: Any) -> Calibration | None:
    """The :class:`Calibration` that the options of :func:`add_calibration` make; None without data."""
    fields = vars(settings.calibration)
    if fields["data"] is None:
        return None
    if fields["resume_folder"] is not None:
        _check_resume_folder(Path(fields["resume_folder"]).expanduser())
    data: Any = load_texts("calibration.data", fields["data"])
    if tokenizer is None and "input_ids" not in getattr(data, "column_names", ()):
        raise ValueError(
            f"--calibration.data {fields['data']} is text, and the model has no tokenizer. Name one: --tokenizer "
            "FOLDER_OR_NAME."
        )
    with values_refused():
        return Calibration(**{**fields, "data": data, "tokenizer": tokenizer})


def _check_resume_folder(folder: Path) -> None:
    """Raise an error where finished blocks cannot be kept in ``folder``, or where it holds a model or an adapter."""
    option = "calibration.resume_folder"
    if folder.is_file():
        raise NotADirectoryError(f"--{option} {folder} is a file. Name a folder.")
    check_place(option, folder)
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            raise FileExistsError(
                f"--{option} {folder} is no folder of a calibration: it holds {name}. Choose another."
            )


def add_budget(parser: ArgumentParser) -> None:
    """``--average_bits``, ``--size``, ``--choices`` and ``--plan``."""
    parser.add_argument(
        "--average_bits",
        type=float | None,
        default=None,
        help="stored bits per weight of the layers, scales included (3 bits in groups of 64 are 3.5): bits "
        "are planned layer by layer on --calibration.data",
    )
    parser.add_argument(
        "--size", type=str | None, default=None, help="the same for the bytes of all tensors, such as 4GB or 3.5GiB"
    )
    parser.add_argument(
        "--choices",
        type=list[int | dict[str, Any]] | None,
        default=None,
        help="what a layer may take: numbers of bits (of codebooks for aqlm), or fields; null: [2, 3, 4]",
    )
    parser.add_argument(
        "--plan",
        type=str | None,
        default=None,
        help="file of a plan that was made before (bit_plan.json in an output)",
    )


def is_to_be_planned(settings: Namespace) -> bool:
    """Whether ``--average_bits`` or ``--size`` is given. Raises WrongUsage for values and options that cannot be."""
    given = [name for name in ("average_bits", "size", "plan") if getattr(settings, name) is not None]
    if len(given) > 1:
        raise WrongUsage(f"--{given[0]} and --{given[1]} are two budgets: give one. Nothing was written.")
    if settings.choices is not None and given in ([], ["plan"]):
        raise WrongUsage("--choices needs a budget: --average_bits 3.5 or --size 4GB. Nothing was written.")
    if given in ([], ["plan"]):
        return False
    if settings.average_bits is not None and not 0 < settings.average_bits <= 32:
        raise WrongUsage(
            f"--average_bits {settings.average_bits} must be above 0 and at most 32. Nothing was written."
        )
    if settings.size is not None:
        with values_refused():
            bytes_of_size(settings.size)
    if settings.calibration.data is None:
        raise WrongUsage(
            f"--{given[0]} needs --calibration.data, on which bits are planned; or give --plan FILE, a plan that was "
            "made before. Nothing was written."
        )
    return True


def check_choices(settings: Namespace, config: QuantConfig) -> None:
    """Raise WrongUsage for the first of ``--choices`` that layers of ``config`` cannot take."""
    if settings.choices is None:
        return
    for part in [[choice] for choice in settings.choices] or [[]]:
        try:
            fields_of_choices(part, config)
        except (TypeError, ValueError) as error:
            reason = str(error).removeprefix("overrides['*']: ")
            raise WrongUsage(f"--choices {part}: {reason} Nothing was written.") from None


def budget(settings: Namespace) -> dict[str, Any]:
    """The arguments of :func:`plan_bits` that the options of :func:`add_budget` make."""
    return {"average": settings.average_bits, "size": settings.size, "choices": settings.choices}


def given_plan(settings: Namespace) -> BitPlan | None:
    """The plan in the file ``--plan``; None without one. Raises FileNotFoundError and ValueError as its reading."""
    if settings.plan is None:
        return None
    if not Path(settings.plan).is_file():
        raise FileNotFoundError(f"--plan {settings.plan}: there is no such file. A budget's output holds {PLAN_FILE}.")
    return BitPlan.load(settings.plan)


def figures_of(plan: BitPlan) -> dict[str, Any]:
    """Totals of a plan, JSON-able."""
    figures = ("bits_per_weight", "model_bytes", "predicted_kl", "measured_kl")
    return {name: getattr(plan, name) for name in figures}


def _configs() -> dict[str, type[QuantConfig]]:
    return {name: config_type(method.spec_type) for name, method in registered_methods().items()}


def _from_yaml(hint: Any) -> Any:
    """``hint`` with a list where the config has a tuple of any length: YAML has no tuples."""
    if hint == tuple[str, ...] | None:
        return list[str] | None
    return hint
