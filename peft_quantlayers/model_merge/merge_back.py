"""Merge adapters back into the quantized model, and say in numbers what that did."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, cast, get_args

from peft import LoraModel, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..calibration import Calibration
from ..calibration.data import max_length
from ..evaluate import Capture, capture
from ..layers import dequantize_model
from ..lora.layer import RULES, LoraQuantizedLinear
from ..merging.report import MergeReport
from ..scales.layers import QuantScalesLayer
from .calibrated import merge_calibrated
from .output_retention import OutputChange, watched
from .refusals import (
    checked_ids,
    checked_names,
    refuse_biases_without_a_place,
    refuse_broken_adapters,
    refuse_other_models,
    refuse_tied_weights,
    score_of,
)
from .targets import SCALES_STRATEGIES, TUNER_RULES, MergeableLayer, ScalesMerge, TunerMerge, tuner_layers

logger = logging.getLogger(__name__)

Strategy = Literal["auto", "exact", "aware", "calibrated", "requantize", "append", "dense", "keep"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

# Tokens that are scored at a time for ``evaluate_on``: three windows of logits are kept.
WINDOW = 256


def merge_back(
    peft_model: PeftModel,
    *,
    strategy: Strategy = "auto",
    adapters: list[str] | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    evaluate_on: Tensor | list[int] | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    unload: bool = True,
    progress: bool = True,
) -> tuple[nn.Module, MergeReport]:
    """Merge adapters into the base model and take the PEFT wrapper off.

    Args:
        peft_model: a PEFT model on a quantized base.
        strategy: how the changes of all adapters, summed in float32, get into the quantized weights.
            ``"auto"``: ``"exact"`` for QA-LoRA, ``"aware"`` for adapters trained so, ``"requantize"`` for others.
            ``"exact"``: QA-LoRA only; the change goes into the float zeros, no code is rounded.
            ``"aware"``: adapters trained with :func:`enable_merge_aware` only; the outputs stay as they are.
            ``"calibrated"``: any LoRA; codes, scales, zeros and codebooks are chosen so that the outputs are right
            on ``calibration``, layer by layer, from the codes that are there.
            ``"requantize"``: without data. The change is rounded into the codes with dither, on the grid that is
            there; or, where nearest codes keep the change and err less, the weight is quantized anew.
            ``"append"``: AQLM only, with or without ``calibration``. One codebook more holds the change: a bit per
            weight more with eight inputs a group and 8-bit codes, in the published format.
            ``"dense"``: a plain float model.
            ``"keep"``: quantized layers with the adapter as a low-rank branch, saved as one model. Both lose nothing
            of ordinary adapters; of those that were trained merge-aware they lose what the rounding was to them.
            PEFT's other tuners (LoHa, OFT, IA3, ...) know ``"auto"``, ``"requantize"`` and ``"dense"``, and tuned
            scales, which always merge exactly, these and ``"exact"``.
        adapters: names of the adapters to merge; None for the active ones.
        calibration: for ``"calibrated"``: texts, token ids, a dataset, or a :class:`Calibration` around them.
        tokenizer: for texts; None for the model's own.
        evaluate_on: held-out token ids, (n_tokens,) or (1, n_tokens) or a list; with them the report says how much of
            the adapter's effect on the predictions is left (:class:`peft_quantlayers.evaluate.Capture`), and of its
            change of each layer's outputs.
        metric: any score of a model, a task's accuracy for example, as a number; called with ``peft_model`` before
            the merge, and after it with the merged base model, of which the adapters are not taken off yet.
        unload: take the PEFT wrapper off. False leaves it on, LoRA only: ``unmerge_adapter()`` puts back the very bits
            from before the merge, whatever the strategy, and ``merge_and_unload()`` gives the merged base model.
        progress: show a progress bar while calibrating.

    Returns:
        The base model, merged, or ``peft_model`` without ``unload``; and the report.

    Raises:
        TypeError: not a PeftModel, ``adapters`` is no list, ``evaluate_on`` holds no token ids, or ``metric`` gave no
            number; the model is left as it was.
        ValueError: an unknown strategy or adapter, adapters that the strategy is not for, one that holds NaN or Inf,
            too few tokens to evaluate on, or unknown ones, or no adapter is left; the model is left as it was. So it
            is after whatever else ``metric`` raises.
        NotImplementedError: the tuner cannot merge, or a layer is no match for the strategy; left as it was too.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is not supported; choose one of {STRATEGIES}.")
    refuse_other_models(peft_model)
    if calibration is None and strategy == "calibrated":
        raise ValueError(
            'strategy="calibrated" needs calibration=: some text like that of the adapter\'s task. Without any, use '
            '"requantize", or "keep" for plain LoRA. The model is left as it was.'
        )
    if calibration is not None and strategy not in ("calibrated", "append"):
        raise ValueError(
            f'strategy={strategy!r} takes no calibration data; "calibrated" and "append" do. The model is left as it '
            "was."
        )
    if isinstance(calibration, Calibration) and calibration.resume_folder is not None:
        raise ValueError(
            "resume_folder is for quantize_model: a merge that was cut off begins anew. Leave it out of the "
            "Calibration. The model is left as it was."
        )
    names = checked_names(peft_model, adapters)
    refuse_broken_adapters(peft_model, names)
    refuse_biases_without_a_place(peft_model, names)
    refuse_tied_weights(peft_model)
    layers = _layers_to_merge(peft_model, names, strategy, is_evaluated=evaluate_on is not None)
    is_lora = isinstance(peft_model.base_model, LoraModel)
    if not unload and not (is_lora and all(isinstance(layer, LoraQuantizedLinear) for layer in layers)):
        raise ValueError(
            "unload=False is for LoRA: other tuners' merges into quantized layers are not taken back bit for bit. "
            "Keep a copy of the model instead. The model is left as it was."
        )
    held_out = None if evaluate_on is None else checked_ids(peft_model, evaluate_on)
    scores = None
    if metric is not None:
        with _only_active(peft_model, layers, names):
            scores = (score_of(metric, peft_model), math.nan)
    before = [layer.merge_state() for layer in layers]
    try:
        if calibration is not None:
            with _only_active(peft_model, layers, names):
                data = Calibration.of(calibration, tokenizer)
                merge_calibrated(peft_model, names, data, append=strategy == "append", progress=progress)
        else:
            for layer in layers:
                _merge(layer, strategy, names)
        captured = None if held_out is None else _captured(peft_model, layers, names, held_out)
        if metric is not None and scores is not None:
            with _only_active(peft_model, layers, names):
                scores = (scores[0], score_of(metric, peft_model.get_base_model()))
        if is_lora:
            _merge_dense_layers(peft_model, layers, names)
    except BaseException:
        _restore(layers, before)
        raise
    reports = tuple(layer.merge_report for layer in layers if layer.merge_report is not None and layer.merged)
    wider = [layer for layer in reports if strategy in ("auto", "exact") and layer.bits_after > layer.bits_before]
    if wider:
        logger.warning(
            "%d of %d layers now keep scales and zeros in float32, %.2f bits per weight more (%s, ...): float16 zeros "
            "would lose more than 1 %% of the change.",
            len(wider),
            len(reports),
            wider[0].bits_after - wider[0].bits_before,
            wider[0].name,
        )
    report = MergeReport(strategy=strategy, layers=reports, capture=captured, scores=scores)
    if not unload:
        return peft_model, report
    _set_active(peft_model, layers, names)  # PEFT keeps the modules_to_save of active adapters
    for layer in layers:
        if isinstance(layer, TunerMerge):
            layer.finish()
    with _said_already_merged():
        model = peft_model.merge_and_unload(adapter_names=names)
    if strategy == "dense":
        dequantize_model(model)
    return model, report


def _layers_to_merge(
    peft_model: PeftModel, names: list[str], strategy: Strategy, *, is_evaluated: bool
) -> list[MergeableLayer]:
    """The quantized layers with one of the adapters, and tuned norms; ValueError if ``strategy`` is not for them."""
    layers: list[MergeableLayer] = []
    for name, layer in tuner_layers(peft_model, names).items():
        if isinstance(layer, LoraQuantizedLinear):
            layers.append(layer)
            continue
        is_scales = isinstance(layer, QuantScalesLayer)
        possible = SCALES_STRATEGIES if is_scales else tuple(TUNER_RULES)
        if strategy not in possible:
            raise ValueError(
                f"{name}: strategy={strategy!r} is for LoRA on quantized layers, and this is a "
                f"{type(layer).__name__}. Choose one of {possible}. The model is left as it was."
            )
        if layer.merged and (is_evaluated or (strategy == "dense" and not is_scales)):
            raise ValueError(
                f"{name}: {layer.merged_adapters} are merged already, and the weight from before is needed for "
                'evaluate_on and for strategy="dense". Call unmerge_adapter() first, or load the adapter onto its '
                "base again. The model is left as it was."
            )
        if isinstance(layer, QuantScalesLayer):
            layers.append(ScalesMerge(layer))
        elif not layer.merged:
            layers.append(TunerMerge(layer))
    if not layers and strategy not in TUNER_RULES:
        raise ValueError(
            f'strategy={strategy!r} is for adapters on quantized layers, and {names} lie on none. Use "auto", which '
            "merges them as PEFT does. The model is left as it was."
        )
    return layers


def _merge(layer: MergeableLayer, strategy: Strategy, names: list[str]) -> None:
    if isinstance(layer, LoraQuantizedLinear):
        layer.merge_with(RULES[strategy], names)
    elif isinstance(layer, TunerMerge):
        layer.merge_with(TUNER_RULES[strategy], names)
    elif isinstance(layer, ScalesMerge):
        layer.merge_with(names, becomes_dense=strategy == "dense")


def _merge_dense_layers(peft_model: PeftModel, layers: list[MergeableLayer], names: list[str]) -> None:
    """PEFT's own merge of LoRA on what is not quantized; taken back where it fails."""
    ours = {id(layer) for layer in layers}
    others = [
        module
        for module in peft_model.modules()
        if isinstance(module, LoraLayer) and id(module) not in ours and not module.merged
    ]
    try:
        with _said_already_merged():
            cast(Any, peft_model.base_model).merge_adapter(adapter_names=names)
    except BaseException:
        for module in others:
            if module.merged:
                cast(Any, module).unmerge()
        raise


@contextmanager
def _said_already_merged() -> Iterator[None]:
    """PEFT says so of every quantized layer, which is merged before its own merge goes through all layers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged|Already following adapters were merged")
        yield


def _captured(peft_model: PeftModel, layers: list[MergeableLayer], names: list[str], token_ids: Tensor) -> Capture:
    """Base, adapter and merged model compared, by putting the layers from one state into the other.

    The layers' outputs are compared too, on the way, and noted in their reports.
    """
    merged = [layer.merge_state() for layer in layers]
    unmerged = [state.unmerged or state for state in merged]
    changes = [OutputChange() for _ in layers]

    def logits(ids: Tensor) -> Tensor:
        return peft_model(input_ids=ids, use_cache=False).logits

    def of_adapter(ids: Tensor) -> Tensor:
        with _in_state(layers, unmerged, back_to=merged), watched(zip(layers, merged, changes, strict=True)):
            return logits(ids)

    def of_base(ids: Tensor) -> Tensor:
        with _in_state(layers, unmerged, back_to=merged), peft_model.disable_adapter():
            return logits(ids)

    was_training = peft_model.training
    peft_model.eval()
    try:
        with _only_active(peft_model, layers, names):
            window = min(WINDOW, len(token_ids), max_length(peft_model))
            captured = capture(of_adapter, of_base, logits, token_ids.to(peft_model.device), window=window)
    finally:
        peft_model.train(was_training)
    for layer, change in zip(layers, changes, strict=True):
        if layer.merge_report is not None:
            layer.merge_report = replace(layer.merge_report, output_kept=change.kept, output_noise=change.noise)
    return captured


@contextmanager
def _only_active(peft_model: PeftModel, layers: list[MergeableLayer], names: list[str]) -> Iterator[None]:
    """Exactly these adapters active, and what was active and trained before put back. What is merged stays merged."""
    active = list(peft_model.active_adapters)
    trained = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    _set_active(peft_model, layers, names)
    try:
        yield
    finally:
        _set_active(peft_model, layers, active)
        for name, parameter in peft_model.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad = name in trained


def _set_active(peft_model: PeftModel, layers: list[MergeableLayer], names: list[str]) -> None:
    """PEFT's ``set_adapter``, which unmerges every layer, without that."""
    states = [layer.merge_state() for layer in layers]
    for layer in layers:
        if layer.merged:
            layer.unmerge()
    cast(Any, peft_model.base_model).set_adapter(names)
    _restore(layers, states)


@contextmanager
def _in_state(layers: list[MergeableLayer], states: list[Any], *, back_to: list[Any]) -> Iterator[None]:
    _restore(layers, states)
    try:
        yield
    finally:
        _restore(layers, back_to)


def _restore(layers: list[MergeableLayer], states: list[Any]) -> None:
    for layer, state in zip(layers, states, strict=True):
        layer.restore(state)
