"""``estimate MODEL``: what quantizing, training and merging will take."""

from __future__ import annotations

from contextlib import suppress

from jsonargparse import Namespace
from peft import LoraConfig

from ...estimate import Estimate, estimate_merging, estimate_quantizing, estimate_training
from ...layers.quantized_layers import quantized_layers
from .. import shared_options as options
from ..given_tokenizers import check_positions, n_positions
from ..models import model_on_meta, refuse_missing_folder
from ..parsing import VerbParser
from ..refused_values import check_at_least
from ..result import Result
from ..trl_trainers import trainer_loss, trainer_of

DESCRIPTION = (
    "Say what memory, disk and time quantizing, training a LoRA adapter and merging it will take on this machine. "
    "From config.json alone: some random weights are quantized, and one block of random numbers is trained for a step."
)
POSITIONALS = ("model",)
MOST = 2**40
LENGTH, MOST_RANK = 512, 2**14


def add_arguments(parser: VerbParser) -> None:
    """Options of the verb."""
    parser.add_argument("--model", type=str, required=True, help="folder of a model, or its name on the Hub")
    options.add_method(parser)
    parser.add_argument("--calibration_tokens", type=int, default=0, help="of a calibration; 0: without one")
    parser.add_argument("--batch_size", type=int, default=1, help="texts in one step of training")
    parser.add_argument(
        "--max_length", type=int | None, default=None, help=f"tokens of each; null: {LENGTH}, or the model's positions"
    )
    parser.add_argument("--gradient_checkpointing", type=bool, default=True, help="recompute activations")
    parser.add_argument("--lora.r", type=int, default=8, help="rank of the adapter")
    parser.add_argument("--lora.target_modules", type=list[str] | str, default="all-linear", help="its layers")


def run(settings: Namespace) -> Result:
    """Estimate each step."""
    refuse_missing_folder("model", settings.model)
    check_at_least(settings, 1, "batch_size", "max_length", most=MOST)
    check_at_least(settings, 0, "calibration_tokens", most=MOST)
    check_at_least(settings, 1, "lora.r", most=MOST_RANK)
    options.check_pattern("lora.target_modules", settings.lora.target_modules)
    model = model_on_meta(settings.model)
    if settings.max_length is not None:
        check_positions(settings.max_length, model.config, "max_length")
    is_quantized = bool(quantized_layers(model))
    if is_quantized and (given := list(options.given_fields(settings))):
        raise ValueError(
            f"{settings.model} is quantized already, and --{given[0]} is for a float model. Leave it out."
        )
    config = None if is_quantized else options.method_config(settings)
    found: list[Estimate] = []
    if config is not None:
        found.append(estimate_quantizing(model, config, calibration_tokens=settings.calibration_tokens))
    lora = LoraConfig(r=settings.lora.r, target_modules=settings.lora.target_modules)
    merged = estimate_merging(model, config, rank=settings.lora.r)
    with suppress(ImportError):
        trainer_of("sft")  # it takes memory too
    found.append(
        estimate_training(  # last, for it leaves an adapter on the model
            model,
            config,
            lora,
            batch_size=settings.batch_size,
            sequence_length=settings.max_length or min(LENGTH, n_positions(model.config) or LENGTH),
            use_gradient_checkpointing=settings.gradient_checkpointing,
            loss_of=trainer_loss,
        )
    )
    found.append(merged)
    return Result(text="\n".join(map(str, found)), data={each.step: each.to_dict() for each in found})
