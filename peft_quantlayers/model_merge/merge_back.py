"""Merge adapters back into the quantized model, and report how much of them is retained."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, SupportsFloat

from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..bit_allocation import BitPlan
from ..bit_allocation.quantizing_under_budget import measured
from ..evaluate import Capture
from ..merging import MergeReport
from ..merging.advice import nothing_merged
from ..merging.merge_rules import requantize_as
from ..merging.strategies import STRATEGIES, Strategy
from ..storage.free_memory import return_free_memory
from .measured_effect import measured_effect, restore
from .merge_calibrated import merge_calibrated
from .merge_targets import MergeTarget
from .merged_model import MergedModel
from .prepared_merge import PreparedMerge, prepared_merge
from .tune_merged import tune_merged, unmerged_predictions
from .unload import merge_dense_layers, unloaded

logger = logging.getLogger(__name__)

# Bytes of layers that are merged before freed memory goes back to the system; the more often, the longer it takes.
BYTES_BEFORE_RETURN = 2**23


def merge_back(
    peft_model: PeftModel,
    *,
    strategy: Strategy = "auto",
    adapters: list[str] | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    budget: float | str | Path | BitPlan | None = None,
    tune_epochs: int = 0,
    evaluate_on: Tensor | list[int] | Any = None,
    metric: Callable[[nn.Module], float] | None = None,
    unload: bool = True,
    progress: bool = True,
) -> MergedModel:
    """Merge adapters into the base model and remove the PEFT wrapper.

    Args:
        peft_model: a PEFT model on a quantized base.
        strategy: how the deltas of all adapters, summed in float32, are merged into the quantized weights.
            ``"auto"``: ``"exact"`` for QA-LoRA, ``"aware"`` for merge-aware adapters, ``"requantize"`` for others.
            ``"exact"``: QA-LoRA only; the delta is folded into the float zeros, no code is rounded.
            ``"aware"``: adapters trained with :func:`enable_merge_aware` only; the outputs do not change.
            ``"calibrated"``: any LoRA; codes, scales, zeros and codebooks are chosen to minimise the output error on
            ``calibration``, layer by layer, starting from the current codes.
            ``"requantize"``: without data. The delta is rounded into the codes with dither, on the current grid; or,
            if nearest codes retain the delta with a lower error, the weight is quantized from scratch.
            ``"append"``: AQLM only, with or without ``calibration``. One more codebook holds the delta: one more bit
            per weight with eight inputs a group and 8-bit codes, in the published format. ``"dense"``: a plain float
            model. ``"keep"``: quantized layers with the adapter as a low-rank branch, saved as one model. Both lose
            nothing of ordinary adapters; merge-aware adapters lose the rounding that they were trained with.
            PEFT's other tuners (LoHa, OFT, IA3, ...) support ``"auto"``, ``"requantize"`` and ``"dense"``; tuned
            scales, which always merge exactly, these and ``"exact"``.
        adapters: names of the adapters to merge; None for the active ones.
        calibration: for ``"calibrated"``: texts, token ids, a dataset, batches for the model's forward, or a
            :class:`Calibration` around them. Layers that it does not reach are merged without calibration.
        tokenizer: for texts; None for the model's own.
        budget: for "requantize", "calibrated" and "auto": the merged linear layers get more or fewer bits by what that
            costs the predictions of the unmerged model. Stored bits per weight of these layers, scales included (3.5),
            the size of the merged model's tensors ("4GB"), both with ``calibration``; or a plan of
            :func:`plan_merge_bits`, or the file that it was saved in. With ``calibration``, what it
            predicted and what was measured afterwards is logged, and set in a plan that was given.
        tune_epochs: after a merge that rounds, epochs over ``calibration`` in which scales and codebooks of the merged
            layers are trained end to end, for the merged model to predict what the unmerged one does; as
            :func:`tune_scales`, with the ``learning_rate`` of the :class:`Calibration`. For "requantize",
            "calibrated", "append" and "auto"; 0 for none. The codes stay.
        evaluate_on: held-out token ids, (n_tokens,) or (1, n_tokens) or a list. If given, the report says how much of
            the adapter's effect on the predictions is retained (:class:`peft_quantlayers.evaluate.Capture`), and how
            much of its delta of each layer's outputs. For models that read or give more than one text: batches, as
            :class:`Calibration` takes them, with ``labels`` of the shape of the logits without their last dimension.
        metric: any score of a model, for example a task's accuracy, as a number; called with ``peft_model`` before
            the merge, and after it with the merged base model, which still has its adapter layers.
        unload: remove the PEFT wrapper. False leaves it, LoRA only: ``unmerge_adapter()`` restores the bits from
            before the merge, whatever the strategy, and ``merge_and_unload()`` gives the merged base model.
        progress: show progress bars.

    Returns:
        The base model, merged, or ``peft_model`` without ``unload``; and the report:
        ``model, report = merge_back(...)``.

    Raises:
        TypeError: not a PeftModel, ``adapters`` is not a list, ``evaluate_on`` holds no token ids, or ``metric`` did
            not return a number.
        ValueError: an unknown strategy or adapter, adapters that the strategy does not support, one that holds NaN or
            Inf, too few tokens to evaluate on, or unknown ones, no adapter is left, or weights that are offloaded,
            sharded or on the meta device.
        NotImplementedError: the tuner cannot merge, or the strategy does not support a layer's method.

    After any error, also one that ``metric`` raises, the model is left as it was.
    """
    merge = prepared_merge(
        peft_model,
        strategy=strategy,
        adapters=adapters,
        calibration=calibration,
        tokenizer=tokenizer,
        budget=budget,
        tune_epochs=tune_epochs,
        evaluate_on=evaluate_on,
        metric=metric,
        unload=unload,
        progress=progress,
    )
    with _all_or_nothing(merge):
        _undo_merges(merge.targets)
        score_before = _score(merge, "Scoring the adapter")
        predictions = unmerged_predictions(merge)
        _merge_layers(merge)
        tune_merged(merge, predictions)
        captured = measured_effect(merge)
        score_after = _score(merge, "Scoring the merged model", is_merged=True)
        merge_dense_layers(merge)
        report = _report(merge, captured, score_before, score_after)
        return MergedModel(unloaded(merge) if unload else peft_model, report)


# ---- the steps, of which others are in files of their own


@contextmanager
def _all_or_nothing(merge: PreparedMerge) -> Iterator[None]:
    """If anything fails inside, every target is restored."""
    before = [target.source.snapshot() for target in merge.targets]
    try:
        yield
    except BaseException:
        restore(merge.targets, before)
        raise


def _undo_merges(targets: Sequence[MergeTarget]) -> None:
    """Begin with the unmerged layers: the adapters may be merged already, by an earlier call or by PEFT."""
    for target in targets:
        target.source.undo_merge()


def _merge_layers(merge: PreparedMerge) -> None:
    plan = merge.plan
    measuring = nullcontext() if plan is None else measured(merge.base_model, plan, merge.calibration)
    with merge.only_its_adapters(), measuring:
        if merge.calibration is None or not STRATEGIES[merge.strategy].data_rules:
            _merge_without_data(merge)
        else:
            merge_calibrated(merge, merge.calibration)


def _merge_without_data(merge: PreparedMerge) -> None:
    """Merge each target by its rule for the strategy, or into the form that was planned for it."""
    n_bytes = 0
    for target in tqdm(merge.targets, desc="Merging", unit="layer", disable=not merge.progress):
        source, spec = target.source, target.spec
        n_bytes += sum(parameter.nbytes for parameter in source.current_base().parameters())
        rule = source.rule_of(merge.strategy) if spec is None else partial(requantize_as, spec=spec)
        source.merge_by(rule, merge.names)
        if n_bytes >= BYTES_BEFORE_RETURN:
            return_free_memory()
            n_bytes = 0


def _score(merge: PreparedMerge, described: str, *, is_merged: bool = False) -> float | None:
    if merge.metric is None:
        return None
    bar = tqdm(total=1, desc=described, unit="score", disable=not merge.progress)
    with merge.only_its_adapters(), bar:
        score = _score_of(merge.metric, merge.base_model if is_merged else merge.peft_model)
        bar.update()
    return score


def _score_of(metric: Callable[[nn.Module], Any], model: nn.Module) -> float:
    """``metric(model)``, a number."""
    value = metric(model)
    if not isinstance(value, SupportsFloat) or (isinstance(value, Tensor) and value.numel() != 1):
        raise TypeError(
            f"metric must give a number, got {type(value).__name__}. Return one score, for example the accuracy. The "
            "model is left as it was."
        )
    score = float(value.detach()) if isinstance(value, Tensor) else float(value)
    if math.isnan(score):
        raise ValueError("metric gave NaN, which cannot be compared. The model is left as it was.")
    return score


def _report(
    merge: PreparedMerge, captured: Capture | None, score_before: float | None, score_after: float | None
) -> MergeReport:
    """What the merge did; what a user should know of it at once is logged."""
    found = (target.source.merge_report for target in merge.targets if target.module.merged)
    layers = tuple(report for report in found if report is not None)
    if said := nothing_merged(layers):
        logger.warning(said)
    wider = [layer for layer in layers if layer.strategy == "exact" and layer.bits_after > layer.bits_before]
    if wider:
        logger.warning(
            "%d of %d layers now keep scales and zeros in float32, %.2f more bits per weight (%s, ...): float16 zeros "
            "would lose more than 1 %% of the delta.",
            len(wider),
            len(layers),
            wider[0].bits_after - wider[0].bits_before,
            wider[0].name,
        )
    scores = None if score_before is None or score_after is None else (score_before, score_after)
    return MergeReport(strategy=merge.strategy, layers=layers, capture=captured, scores=scores)
