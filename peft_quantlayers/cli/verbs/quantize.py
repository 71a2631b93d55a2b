"""``quantize MODEL OUTPUT``: quantize a model and save it."""

from __future__ import annotations

from typing import Any, Literal

from jsonargparse import Namespace

from ...methods import QuantConfig
from ...model import quantize_model
from ...report import ModelSummary, summary
from ...saving import save_model
from ...streaming import quantize_checkpoint
from ...transforms import TRANSFORMS
from .. import options
from ..models import load_model, load_tokenizer, model_on_meta, refuse_missing_folder
from ..parsing import VerbParser
from ..result import Result

DESCRIPTION = (
    "Quantize a model and save it, with its tokenizer; with --calibration.data so that the outputs' error is small. "
    "Files are read one tensor or one block at a time, and the same command goes on after an interruption."
)
POSITIONALS = ("model", "output")


def add_arguments(parser: VerbParser) -> None:
    """Options of the verb."""
    options.add_model(parser)
    options.add_output(parser)
    options.add_method(parser)
    options.add_calibration(parser)
    parser.add_argument(
        "--transforms",
        type=list[Literal[tuple(TRANSFORMS)]] | None,
        default=None,
        help="changes of the float weights first, in this order, such as [awq_scales]; the model is then in memory",
    )
    parser.add_argument(
        "--n_processes", type=int, default=1, help="how many share the work; 1 with calibration or --overwrite"
    )


def run(settings: Namespace) -> Result:
    """Quantize, save, and say what became of the model."""
    config = options.method_config(settings)
    refuse_missing_folder("model", settings.model)
    if settings.dry_run:
        found = planned(settings.model, config)
        return _result(found, f"{settings.output} would hold:\n{found}")
    if can_be_streamed(settings):
        found = planned(settings.model, config)
        quantize_checkpoint(
            settings.model,
            settings.output,
            config,
            calibration=options.calibration(settings, load_tokenizer(settings.model)),
            device=settings.device,
            n_processes=settings.n_processes,
        )
    elif settings.n_processes > 1:
        raise ValueError(
            f"--n_processes {settings.n_processes} goes from files to files: leave out --overwrite, --dtype, "
            "--transforms, --tokenizer and --calibration.resume_folder. Nothing was written."
        )
    else:
        options.refuse_output_in_use(settings)
        found = quantized_in_memory(settings, config)
    return _result(found, f"{found}\nsaved in {settings.output}", output=settings.output)


def can_be_streamed(settings: Namespace) -> bool:
    """Whether files become files, a part at a time: nothing needs the whole model, and nothing is replaced."""
    is_plain = settings.dtype == "auto" and settings.tokenizer is None and settings.calibration.resume_folder is None
    return is_plain and not settings.overwrite and not settings.transforms


def quantized_in_memory(settings: Namespace, config: QuantConfig) -> ModelSummary:
    """Load, quantize and save; what became of the model."""
    tokenizer = load_tokenizer(settings.tokenizer or settings.model)
    data = options.calibration(settings, tokenizer)
    transforms = [TRANSFORMS[name]() for name in settings.transforms or ()]
    load: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device}
    while_loading = data is None and not transforms
    if while_loading:
        load["quantization_config"] = config
    model: Any = load_model(settings.model, **load)
    if not while_loading:
        quantize_model(model, config, calibration=data, transforms=transforms or None)
    save_model(model, settings.output, tokenizer=tokenizer, overwrite=settings.overwrite)
    return summary(model)


def planned(name: str, config: QuantConfig) -> ModelSummary:
    """What ``config`` would make of the model ``name``, from its config alone."""
    return summary(model_on_meta(name), config)


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
