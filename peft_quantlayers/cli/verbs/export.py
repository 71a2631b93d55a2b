"""``export MODEL OUTPUT --format NAME``: write a model as an inference engine reads it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from torch import Tensor

from ...arguments import check_choice
from ...exports import export, export_formats
from .. import shared_options as options
from ..given_tokenizers import check_ids, load_tokenizer, needed_tokenizer, tokenizer_name
from ..in_options import in_options
from ..models import another_base_refused, config_of, load_model, model_and_adapter, refuse_missing_folder
from ..parsing import VerbParser
from ..read_data import DATA_HELP, token_ids
from ..refused_values import check_at_least, values_refused
from ..result import Result

DESCRIPTION = "Write a quantized model as an inference engine reads it, exactly, and print the command that serves it."
POSITIONALS = ("model", "output")


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


def check_values(settings: Namespace) -> None:
    """Raise WrongUsage for a format that there is not, and for options that contradict each other."""
    options.check_calibration(settings)
    with values_refused():
        check_choice("format", settings.format, tuple(export_formats()), remedy="Nothing was written.")
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
    options.refuse_output_in_use(settings)
    if settings.dry_run:
        known = export_formats()[settings.format]
        return Result(text=f"would write {name} into {settings.output}\n{known}")
    tokenizer_of = tokenizer_name(settings.tokenizer, name, adapter)
    tokenizer = None if tokenizer_of == name else needed_tokenizer(tokenizer_of)
    data = options.calibration(settings, tokenizer or load_tokenizer(name))
    text: Any = None
    if settings.text is not None:
        tokenizer = tokenizer or needed_tokenizer(name)
        text = read_text(settings, tokenizer, name)
    float_model = None
    if settings.float_model is not None:
        float_model = load_model(settings.float_model, option="float_model")
    with another_base_refused():
        report = export(
            name,
            settings.output,
            settings.format,
            adapter=adapter,
            dtype=None if settings.dtype == "auto" else getattr(torch, settings.dtype),
            approximate=settings.approximate,
            tokenizer=tokenizer,
            calibration=data,
            float_model=float_model,
            text=text,
            overwrite=settings.overwrite,
        )
    return Result(text=in_options(str(report)), data=dataclasses.asdict(report), output=settings.output)
