"""``quantize MODEL OUTPUT``: quantize a model and save it."""

from __future__ import annotations

import torch
from jsonargparse import Namespace
from transformers import AutoConfig, PreTrainedModel

from ...calibration import Calibration
from ...methods import QuantConfig
from ...model import quantize_model
from ...report import ModelSummary, summary
from ...saving import save_model
from .. import options
from ..models import load_model, load_tokenizer, model_class, refuse_missing_folder
from ..parsing import VerbParser
from ..result import Result

DESCRIPTION = (
    "Quantize a model and save it, with its tokenizer. With --calibration.data the outputs' error is minimised."
)
POSITIONALS = ("model", "output")


def add_arguments(parser: VerbParser) -> None:
    """Options of the verb."""
    options.add_model(parser)
    options.add_output(parser)
    options.add_method(parser)
    options.add_calibration(parser)


def run(settings: Namespace) -> Result:
    """Quantize, save, and say what became of the model."""
    config = options.method_config(settings)
    refuse_missing_folder("model", settings.model)
    if settings.dry_run:
        found = planned(settings.model, config)
        return _result(found, f"{settings.output} would hold:\n{found}")
    options.refuse_output_in_use(settings)
    tokenizer = load_tokenizer(settings.tokenizer or settings.model)
    data = options.calibration(settings, tokenizer)
    model = quantized(settings, config, data)
    save_model(model, settings.output, tokenizer=tokenizer, overwrite=settings.overwrite)
    found = summary(model)
    return _result(found, f"{found}\nsaved in {settings.output}", output=settings.output)


def quantized(settings: Namespace, config: QuantConfig, data: Calibration | None) -> PreTrainedModel:
    """The model, quantized while loading where no layer's inputs are needed."""
    load = {"dtype": settings.dtype, "device": settings.device}
    if data is None:
        return load_model(settings.model, **load, quantization_config=config)
    model = load_model(settings.model, **load)
    quantize_model(model, config, calibration=data)
    return model


def planned(name: str, config: QuantConfig) -> ModelSummary:
    """What ``config`` would make of the model ``name``, from its config alone."""
    with torch.device("meta"):
        found = model_class(name)
        build = getattr(found, "from_config", found)
        model = build(AutoConfig.from_pretrained(name))
    return summary(model, config)


def _result(found: ModelSummary, text: str, *, output: str | None = None) -> Result:
    return Result(
        text=text,
        output=output,
        data={
            "n_parameters": found.n_parameters,
            "nbytes": found.nbytes,
            "fraction_quantized": found.fraction_quantized,
            "quantized": [
                {"spec": group.label, "layers": len(group.names), "bits_per_weight": group.bits_per_weight}
                for group in found.by_spec
            ],
            "dense": [{"reason": group.label, "modules": list(group.names)} for group in found.by_reason],
        },
    )
