"""Train scales, zeros and codebooks of a quantized model end to end until it predicts what another model does."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arguments import check_choice, check_flag, check_integer, check_model, check_number
from ..calibration import Calibration
from ..calibration.blocks import evaluating
from ..calibration.model_calls import model_calls
from ..calibration.trained_metadata import trained_metadata
from ..formats.quant_spec import METADATA_ROLES, Role
from ..layers import QuantizedLinear
from ..layers.placement import check_weights_are_here
from ..lora import has_adapters
from ..storage import locked_folder
from .predictions import Predictions, held_out, logits_of, record_predictions
from .tuning_state import TuningState, fingerprint

logger = logging.getLogger(__name__)

# Zeros beside scales gave nothing more in the source's ablation (Llama-2-7B, 2 bits: 7.68, 7.69 and both 7.68).
DEFAULT_ROLES: tuple[Role, ...] = ("scales", "codebooks")


@dataclass(frozen=True, kw_only=True)
class TuningResult:
    """What :func:`tune_scales` did.

    Fields:
        kl_before, kl_after: mean KL divergence from the teacher's predictions, nats for each token, on the windows
            that were not trained on (of a single window: on itself).
        n_steps: that were made.
        is_kept: whether the model was changed: not if the divergence did not fall.
    """

    kl_before: float
    kl_after: float
    n_steps: int
    is_kept: bool


def tune_scales(
    model: nn.Module,
    teacher: nn.Module | Predictions | str | Path,
    calibration: Any = None,
    *,
    train: Sequence[Role] = DEFAULT_ROLES,
    epochs: int = 2,
    learning_rate: float = 1e-3,
    tokenizer: Any = None,
    resume_folder: str | Path | None = None,
    progress: bool = True,
) -> TuningResult:
    """Train scales of the quantized layers of ``model``, in place, for its predictions to be those of ``teacher``.

    The codes and the format stay. All layers are trained together, by Adam with a cosine schedule on the KL divergence
    of the predictions, so errors of different layers make up for each other, which no training of single layers or
    blocks finds. Every eighth window is left out, and the model ends as it was if the divergence there did not fall.
    Experts, dense weights and norms stay.

    Args:
        model: with quantized linear layers and without adapters; merge them first. In memory with the activations of
            one batch and their gradients.
        teacher: the float model (in memory beside ``model`` only while its predictions are recorded, if it is given by
            them), its :class:`Predictions`, or the file that these were saved in.
        calibration: as in :func:`quantize_model`, if the teacher is a model; otherwise the batches are the teacher's.
            One batch is one step: of data that is no :class:`Calibration`, one window.
        train: roles of the tensors to train: "scales", "zeros", "codebooks". Layers without such tensors stay.
        epochs: over the batches.
        learning_rate: relative to the root mean square of each tensor.
        tokenizer: for texts, unless ``calibration`` is a :class:`Calibration`.
        resume_folder: where the state of an unfinished run is stored every two minutes. The same call goes on from
            there, with the same result; in the end the state is removed.
        progress: show a progress bar.

    Raises:
        TypeError: arguments of other kinds; a model without logits.
        ValueError: no layer to train; adapters on the model; the teacher has another vocabulary; data that is
            refused; a state of another run; a loss that is not finite. The model is as it was.

    Source: Chen et al. 2024 (EfficientQAT), end-to-end training of quantization parameters; with the divergence from
    the float model in place of the texts' own next tokens.
    """
    check_model("tune_scales", model)
    check_integer("epochs", epochs, at_least=1, at_most=10_000)
    check_number("learning_rate", learning_rate, above=0.0, at_most=1.0)
    check_flag("progress", progress)
    if isinstance(train, str) or not train:
        raise TypeError(f"train must be a list of roles such as ('scales', 'codebooks'), got {train!r}.")
    for role in train:
        check_choice("train", role, METADATA_ROLES)
    if has_adapters(model):
        raise ValueError(
            "the model carries adapters, which were trained on its scales as they are. Merge them first (merge_back "
            "tunes the merged model with tune_epochs=), or tune before they are added. The model was not changed."
        )
    check_weights_are_here(
        model,
        "tuning",
        if_offloaded=" Load the model into memory to tune it.",
        if_sharded="Tune and save the model in one process, and load the folder sharded.",
    )
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if not any(set(layer.spec.trainable_roles(*_shape(layer)).values()) & set(train) for layer in layers):
        raise ValueError(
            f"the model has no quantized linear layer with {' or '.join(train)} to train. Quantize it first, or name "
            "other roles: train=('scales', 'zeros', 'codebooks')."
        )
    predictions = _predictions_of(teacher, calibration, tokenizer, progress=progress)
    return tuned(
        model,
        layers,
        predictions,
        train=train,
        epochs=epochs,
        learning_rate=learning_rate,
        resume_folder=resume_folder,
        progress=progress,
    )


def tuned(
    model: nn.Module,
    layers: Sequence[QuantizedLinear],
    predictions: Predictions,
    *,
    train: Sequence[Role],
    epochs: int,
    learning_rate: float,
    beside: Sequence[nn.Parameter] = (),
    resume_folder: str | Path | None = None,
    progress: bool = True,
) -> TuningResult:
    """:func:`tune_scales` of these ``layers`` of ``model``, and of the parameters ``beside``.

    Arguments are taken to be right.
    """
    calls = model_calls(model, predictions.batches)
    left_out = held_out(len(calls))
    order = [number for number in range(len(calls)) if number not in left_out] or [0]
    steps = order * epochs

    def loss_of(number: int) -> Tensor:
        return predictions.divergence(number, logits_of(model, calls[number]))

    @torch.no_grad()
    def divergence() -> float:
        losses = [float(loss_of(number)) * len(predictions.log_probs[number]) for number in left_out]
        return sum(losses) / sum(len(predictions.log_probs[number]) for number in left_out)

    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.autocast(device.type, enabled=False, cache_enabled=False))
        stack.enter_context(torch.enable_grad())
        before = divergence()
        state = None
        if resume_folder is not None:
            folder = Path(resume_folder).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked_folder(folder))
            options = {"train": list(train), "epochs": epochs, "learning_rate": learning_rate}
            state = TuningState(folder, fingerprint(layers, predictions, options))
        trained = stack.enter_context(trained_metadata(model, layers, roles=train, beside=beside))
        optimizer = torch.optim.Adam(trained.rates(learning_rate), betas=(0.9, 0.95))
        rates = [group["lr"] for group in optimizer.param_groups]
        first = 0 if state is None else state.restore(trained, optimizer)
        bar = tqdm(total=len(steps), initial=first, desc="Tuning", unit="step", disable=not progress)
        with bar:
            for step in range(first, len(steps)):
                loss = loss_of(steps[step])
                if not torch.isfinite(loss):
                    raise ValueError(
                        f"the divergence at step {step} is not finite. Lower learning_rate={learning_rate}. The model "
                        "is as it was."
                    )
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / len(steps)))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.update()
                bar.set_postfix(kl=f"{loss.item():.4f}")
                if state is not None:
                    state.keep_sometimes(trained, optimizer, step + 1)
        after = divergence()
        if is_kept := after < before:
            trained.keep()
        if state is not None:
            state.remove()
    logger.info("tuned in %d steps: KL %.5f to %.5f", len(steps), before, after)
    if not is_kept:
        logger.warning(
            "tuning did not lower the divergence (%.5f to %.5f on windows that were left out); the model is as it "
            "was. Give more data, or a lower learning_rate.",
            before,
            after,
        )
    return TuningResult(kl_before=before, kl_after=after if is_kept else before, n_steps=len(steps), is_kept=is_kept)


def _predictions_of(teacher: Any, calibration: Any, tokenizer: Any, *, progress: bool) -> Predictions:
    """The predictions that are given, or those of the model that is given. Raises as :func:`tune_scales`."""
    if isinstance(teacher, nn.Module):
        if calibration is None:
            raise ValueError(
                "tune_scales needs calibration=, on which the teacher predicts. The model was not changed."
            )
        if not isinstance(calibration, Calibration):
            calibration = Calibration(data=calibration, tokenizer=tokenizer, batch_size=1)
        return record_predictions(teacher, calibration, tokenizer=tokenizer, progress=progress)
    if calibration is not None:
        raise ValueError(
            "the teacher's predictions hold the data that they were made on; leave calibration out. The model was not "
            "changed."
        )
    if isinstance(teacher, Predictions):
        return teacher
    if not isinstance(teacher, (str, Path)):
        raise TypeError(
            f"teacher must be a model, its Predictions or their file, got {type(teacher).__name__}. The model was not "
            "changed."
        )
    return Predictions.load(teacher)


def _shape(layer: QuantizedLinear) -> tuple[int, int]:
    return layer.out_features, layer.in_features
