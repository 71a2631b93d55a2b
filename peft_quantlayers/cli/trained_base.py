"""The quantized base of what is trained on a float model: saved once, so that no other verb needs the float model."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from jsonargparse import Namespace
from peft import LoraConfig, PeftConfig, inject_adapter_in_model

from ..estimate import Estimate, estimate_training
from ..estimate.estimates import size_text, time_text
from ..estimate.meta_model import quantized_on_meta
from ..methods import QuantConfig
from ..report import summary
from ..streaming import quantize_checkpoint
from . import pv_training, work
from . import shared_options as options
from .models import OWN_BASE, is_quantized_already, model_on_meta
from .parsing import parse
from .result import Result
from .saved_settings import save_settings
from .trl_trainers import trainer_loss
from .verbs import quantize

# Of a checkpoint, in sizes of the adapter: the adapter itself, and AdamW's two moments.
_CHECKPOINT_COPIES = 3
# Between looks whether the process that quantizes is done.
_WAIT_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Rehearsed:
    """What a run will read.

    Fields:
        n_steps: of the optimizer.
        longest_row: tokens of the longest row, as the trainer cuts or packs it; None where that is not known.
    """

    n_steps: int
    longest_row: int | None


def refuse_options_of_float_models(settings: Namespace) -> None:
    """Raise ValueError where options say how to quantize what is quantized."""
    given = [f"--quantization.{name}" for name in options.given_fields(settings.quantization)]
    given += [] if settings.base_output is None else ["--base_output"]
    if given:
        raise ValueError(
            f"{settings.model} is quantized already, and {given[0]} is for a float model. Leave it out, or give the "
            "float model. Nothing was written."
        )


def base_folder(settings: Namespace) -> Path:
    """Where the quantized base of a float model goes, as a path that is the same from everywhere."""
    return Path(settings.base_output or Path(settings.output) / OWN_BASE).resolve()


def quantized_base(settings: Namespace, adapter: PeftConfig | None, processes: PartialState) -> str:
    """The folder of the model ``settings.model``, quantized; the first of several processes writes it.

    Raises:
        ValueError: the adapter fits no layer of the model, and nothing was written; as :func:`quantize_checkpoint`.
        FileExistsError: the folder holds another model.
    """
    folder, config = base_folder(settings), options.method_config(settings.quantization)
    if adapter is not None:
        _check_layers(settings.model, adapter)
    if processes.is_main_process:
        quantize_checkpoint(settings.model, folder, config, device=settings.device)
        if not (folder / "quantize.yaml").exists():
            _save_settings(settings, config, folder)
    # It may take hours, and a barrier gives up after minutes. If it fails, the launcher ends all processes.
    while not (folder / "config.json").is_file():
        time.sleep(_WAIT_SECONDS)
    processes.wait_for_everyone()
    return str(folder)


def _save_settings(settings: Namespace, config: QuantConfig, folder: Path) -> None:
    """Write ``quantize.yaml``, by which ``quantize`` does the same again, and ``report`` finds the float model."""
    parser = work.verb_parser("quantize", quantize)
    given = parse(
        parser, [settings.model, str(folder), "--method", settings.quantization.method], quantize.POSITIONALS
    )
    given.device = settings.device
    options.resolve_method(given, config)
    save_settings("quantize", parser, given, folder)


def _check_layers(name: str, adapter: PeftConfig) -> None:
    """Raise ValueError where ``adapter`` names layers that the model does not have."""
    tried = copy.deepcopy(adapter)
    if isinstance(tried, LoraConfig):
        tried.init_lora_weights = tried.use_dora = False  # they would read weights
    inject_adapter_in_model(tried, model_on_meta(name), low_cpu_mem_usage=True)


def plan_of_training(
    settings: Namespace,
    adapter: PeftConfig | None,
    commands: Sequence[str],
    *,
    n_rows: int,
    rehearsed: Rehearsed | None,
) -> Result:
    """What would be done, and what it takes; ``commands`` are run at the end."""
    longest = None if rehearsed is None else rehearsed.longest_row
    estimate, disk = _costs(settings, adapter, longest)
    places = {
        "quantized base": base_folder(settings),
        "adapter": settings.output,
        "model": settings.output,
        "merged model": settings.merged_output or Path(settings.output) / "merged",
    }
    lines = [f"would train {settings.model} on {n_rows} rows into {settings.output}", str(estimate)]
    if longest is not None:
        lines.append(f"  with rows as long as the longest, which has {longest:,} tokens")
    if rehearsed is not None and estimate.seconds is not None:
        each = estimate.seconds * settings.training.gradient_accumulation_steps
        lines.append(f"  {rehearsed.n_steps:,} steps, {time_text(rehearsed.n_steps * each)} at most")
    lines.append("on disk:")
    lines += [
        f"  {size_text(size)} {name}{f' in {places[name]}' if name in places else ''}" for name, size in disk.items()
    ]
    lines += ["then:", *(f"  {command}" for command in commands)] if commands else []
    data = {"rows": n_rows, **estimate.to_dict(), "disk": disk, "then": list(commands)}
    data |= {} if rehearsed is None else dataclasses.asdict(rehearsed)
    return Result(text="\n".join(lines), data=data)


def _costs(settings: Namespace, adapter: PeftConfig | None, longest: int | None) -> tuple[Estimate, dict[str, int]]:
    """What a step on rows of ``longest`` tokens takes, and bytes that will be written, by what they are."""
    is_new = not is_quantized_already(settings.model)
    config: QuantConfig | None = options.method_config(settings.quantization) if is_new else None
    model: Any = model_on_meta(settings.model)
    base = summary(model, config).nbytes
    if adapter is None:
        quantized_on_meta(model, config)
        estimate = pv_training.costs(settings.model, model, settings.pv.buffer_bytes, base)
        disk = {"quantized base": base} if is_new else {}
        return estimate, disk | {
            "model": estimate.disk,
            "a checkpoint": estimate.disk + estimate.memory["codebooks"] // 2,
        }
    rows = 2 if settings.trainer == "dpo" else 1  # chosen and rejected
    estimate = estimate_training(
        model,
        config,
        adapter,
        batch_size=rows * settings.training.per_device_train_batch_size,
        sequence_length=longest
        or settings.training.max_length
        or model.config.get_text_config().max_position_embeddings,
        use_gradient_checkpointing=bool(settings.training.gradient_checkpointing),
        loss_of=trainer_loss,
    )
    disk = {"quantized base": base} if is_new else {}
    disk |= {"adapter": estimate.disk, "a checkpoint": _CHECKPOINT_COPIES * estimate.disk}
    return estimate, disk | ({} if settings.merge is None else {"merged model": base})
