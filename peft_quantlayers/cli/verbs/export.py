"""``export MODEL OUTPUT --format NAME``: write a model as an inference engine reads it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from torch import Tensor

from quantlayers_cli.option_names import WrongUsage

from ...estimate import estimate_reading
from ...exports import ExportFormat, export, export_formats
from ...exports.export import bytes_of_export
from ...exports.formats.format_registry import format_named
from .. import shared_options as options
from ..given_tokenizers import check_ids, load_tokenizer, needed_tokenizer, tokenizer_name
from ..in_options import in_options
from ..models import (
    another_base_refused,
    config_of,
    load_model,
    model_and_adapter,
    refuse_missing_folder,
    weight_bytes,
)
from ..parsing import VerbParser
from ..read_data import DATA_HELP, token_ids
from ..refused_values import check_at_least, values_refused
from ..result import Result

DESCRIPTION = "Write a quantized model as an inference engine reads it, exactly, and print the command that serves it."
POSITIONALS = ("model", "output")
# Of a layer in float32: its weight, what is stored, and the difference.
_LAYER_COPIES = 3


def add_arguments(parser: VerbParser) -> None:
    """Options of the verb."""
    names = ", ".join(export_formats())
    parser.add_argument(
        "--model",
        type=str,
        required=True,
        help="folder of a quantized model, or its name on the Hub; or the folder of an adapter: its base and itself",
    )
    parser.add_argument("--format", type=str, required=True, help=f"one of {names}")
    options.add_output(parser)
    parser.add_argument("--adapter", type=str | None, default=None, help="adapter to write beside it, for the engine")
    parser.add_argument("--tokenizer", type=str | None, default=None, help="its folder or name; null: the model's")
    parser.add_argument("--dtype", type=options.DTYPES, default="auto", help="of dense tensors, scales and zeros")
    parser.add_argument(
        "--approximate",
        type=Literal["8bit", "adapter", "requantize"] | None,
        default=None,
        help="how to store zeros that the format does not hold; null: refuse",
    )
    parser.add_argument(
        "--float_model", type=str | None, default=None, help="for requantize: what the model was made of"
    )
    parser.add_argument("--text", type=str | None, default=None, help=f"to compare the export on (KL): {DATA_HELP}")
    parser.add_argument("--n_tokens", type=int, default=2048, help="tokens of the text to use")
    options.add_calibration(parser)


def check_approximate(settings: Namespace, target: ExportFormat) -> None:
    """Raise WrongUsage for an approximation that the format does not take, or options of another one."""
    if settings.approximate is not None and settings.approximate not in target.approximations:
        can = " or ".join(f"--approximate {each}" for each in target.approximations)
        raise WrongUsage(
            f"--approximate {settings.approximate}: {target.name} takes {can or 'none'}. Nothing was written."
        )
    if settings.approximate != "requantize":
        for option, value in (("float_model", settings.float_model), ("calibration.data", settings.calibration.data)):
            if value is not None:
                raise WrongUsage(f"--{option} is for --approximate requantize. Give that too, or leave it out.")


def check_values(settings: Namespace) -> None:
    """Raise WrongUsage for a format that there is not, and for options that contradict each other."""
    options.check_calibration(settings)
    with values_refused():
        target = format_named(settings.format)
        check_approximate(settings, target)
    check_at_least(settings, 1, "n_tokens")


def read_text(settings: Namespace, tokenizer: Any, name: str) -> Tensor:
    """The token ids of ``--text``, which the model ``name`` knows."""
    text = token_ids("text", settings.text, tokenizer, n_tokens=settings.n_tokens)
    check_ids(text, config_of(name))
    return text


def run(settings: Namespace) -> Result:
    """Export, and say what came of it."""
    check_values(settings)
    refuse_missing_folder("model", settings.model)
    name, adapter = model_and_adapter(settings.model, settings.adapter)
    options.check_output(settings, inputs=(name, adapter or ""))
    if not settings.dry_run:
        options.refuse_output_in_use(settings)
    tokenizer_of = tokenizer_name(settings.tokenizer, name, adapter)
    tokenizer = None if tokenizer_of == name else needed_tokenizer(tokenizer_of)
    data = options.calibration(settings, tokenizer or load_tokenizer(name))
    text: Any = None
    if settings.text is not None:
        tokenizer = tokenizer or needed_tokenizer(name)
        text = read_text(settings, tokenizer, name)
    asked: dict[str, Any] = {
        "adapter": adapter,
        "dtype": None if settings.dtype == "auto" else getattr(torch, settings.dtype),
        "approximate": settings.approximate,
        "tokenizer": tokenizer,
    }
    if settings.dry_run:
        with another_base_refused():
            disk, largest = bytes_of_export(name, settings.output, settings.format, **asked)
        weights = {"largest layer": 4 * _LAYER_COPIES * largest}
        if settings.text is not None:
            weights["the model, to compare"] = weight_bytes(name)
        costs = estimate_reading("export", weights=weights, disk=disk)
        known = format_named(settings.format)
        return Result(text=f"would write {name} into {settings.output}\n{known}\n{costs}", data=costs.to_dict())
    float_model = None
    if settings.float_model is not None:
        float_model = load_model(settings.float_model, option="float_model")
    with another_base_refused():
        report = export(
            name,
            settings.output,
            settings.format,
            **asked,
            calibration=data,
            float_model=float_model,
            text=text,
            overwrite=settings.overwrite,
        )
    return Result(text=in_options(str(report)), data=dataclasses.asdict(report), output=settings.output)
