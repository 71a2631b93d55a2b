"""Merge adapters back into the quantized model, and report how much of them is retained."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast, get_args

from peft import LoraModel, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arguments import check_callable, check_choice, check_flag, check_integer, check_tokenizer
from ..bit_allocation import BitPlan
from ..calibration import Calibration
from ..formats import QuantSpec
from ..layers import dequantize_model
from ..merging import LayerMergeReport, MergeReport
from ..merging.advice import WITHOUT_NOISE, nothing_merged
from ..merging.merge_rules import RULES_FOR_ANY_DELTA
from ..storage.free_memory import return_free_memory
from .active_adapters import only_active, set_active
from .effect import measured_effect, restore
from .held_out_calls import held_out_batches
from .merge_budget import measured_plan, merge_plan_of, planned_sources, planned_specs
from .merge_calibrated import merge_calibrated, rule_of
from .merged_model import MergedModel
from .refused_merges import (
    checked_names,
    refuse_biases_without_a_place,
    refuse_broken_adapters,
    refuse_other_models,
    refuse_tied_weights,
    refuse_weights_elsewhere,
    score_of,
)
from .targets import MergeTarget, merge_targets
from .tune_merged import tune_merged, unmerged_predictions

logger = logging.getLogger(__name__)

Strategy = Literal["auto", "exact", "aware", "calibrated", "requantize", "append", "dense", "keep"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
TAKING_CALIBRATION: tuple[Strategy, ...] = ("calibrated", "append")
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
    refuse_other_models(peft_model)
    check_strategy(strategy, calibration, tune_epochs, has_budget=budget is not None)
    check_tokenizer(tokenizer)
    check_callable("metric", metric, "a model")
    for flag, value in (("unload", unload), ("progress", progress)):
        check_flag(flag, value)
    refuse_weights_elsewhere(peft_model)
    names = checked_names(peft_model, adapters)
    refuse_broken_adapters(peft_model, names)
    refuse_biases_without_a_place(peft_model, names)
    refuse_tied_weights(peft_model)
    targets = _checked_targets(peft_model, names, strategy, needs_unmerged=evaluate_on is not None, is_unloaded=unload)
    held_out = None if evaluate_on is None else held_out_batches(peft_model.get_base_model(), evaluate_on)
    data = None if calibration is None else Calibration.of(calibration, tokenizer).of_merge()
    plan, specs = None, None
    if budget is not None:
        plan = merge_plan_of(peft_model, targets, names, budget, data, strategy=strategy, progress=progress)
        specs = planned_specs(peft_model, targets, names, plan)
    score_before = _score(metric, peft_model, targets, names, progress=progress)
    captured = predictions = None
    if data is not None and tune_epochs:
        predictions = unmerged_predictions(peft_model, targets, names, data, progress=progress)
    with _all_or_nothing(targets):
        with only_active(peft_model, targets, names), measured_plan(peft_model, plan, data):
            if data is None or strategy not in TAKING_CALIBRATION:
                _merge_without_data(peft_model, targets, names, strategy, specs or {}, progress=progress)
            else:
                merge_calibrated(peft_model, targets, names, data, strategy=strategy, specs=specs, progress=progress)
        if data is not None and predictions is not None:
            with only_active(peft_model, targets, names):
                tune_merged(
                    peft_model,
                    targets,
                    predictions,
                    epochs=tune_epochs,
                    learning_rate=data.learning_rate,
                    progress=progress,
                )
        if held_out is not None:
            captured = measured_effect(peft_model, targets, names, held_out, progress=progress)
        score_after = _score(metric, peft_model, targets, names, is_merged=True, progress=progress)
        if isinstance(peft_model.base_model, LoraModel):
            _merge_dense_layers(peft_model, targets, names)
    scores = None if score_before is None or score_after is None else (score_before, score_after)
    report = MergeReport(strategy=strategy, layers=_reports(targets), capture=captured, scores=scores)
    if said := nothing_merged(report.layers):
        logger.warning(said)
    _warn_of_wider_metadata(report)
    return MergedModel(_unloaded(peft_model, targets, names, strategy) if unload else peft_model, report)


def _merge_without_data(
    peft_model: PeftModel,
    targets: Sequence[MergeTarget],
    names: list[str],
    strategy: Strategy,
    specs: Mapping[str, QuantSpec],
    *,
    progress: bool,
) -> None:
    """Merge each target by its rule for ``strategy``, or into the form that ``specs`` has for its layer."""
    named = planned_sources(peft_model, targets) if specs else {}
    planned = {id(source): specs[name] for name, source in named.items() if name in specs}
    n_bytes = 0
    for target in tqdm(targets, desc="Merging", unit="layer", disable=not progress):
        spec = planned.get(id(target.source))
        n_bytes += sum(parameter.nbytes for parameter in target.source.current_base().parameters())
        target.source.merge_by(target.source.merge_rules[strategy] if spec is None else rule_of(spec), names)
        if n_bytes >= BYTES_BEFORE_RETURN:
            return_free_memory()
            n_bytes = 0


def check_strategy(strategy: Strategy, calibration: Any, tune_epochs: int, *, has_budget: bool) -> None:
    """Raise an error, before anything is loaded, for a strategy that these arguments do not fit."""
    check_choice("strategy", strategy, STRATEGIES, remedy="The model is left as it was.")
    check_integer("tune_epochs", tune_epochs, at_least=0, at_most=10_000)
    if tune_epochs and strategy in WITHOUT_NOISE:
        raise ValueError(
            f"tune_epochs={tune_epochs} makes up for what rounding loses, and strategy={strategy!r} rounds nothing. "
            "Leave it out. The model is left as it was."
        )
    if tune_epochs and calibration is None:
        raise ValueError(
            f"tune_epochs={tune_epochs} needs calibration=, on which the merged model learns to predict what the "
            "unmerged one does. The model is left as it was."
        )
    if calibration is None and strategy == "calibrated":
        raise ValueError(
            'strategy="calibrated" needs calibration=: some text like that of the adapter\'s task. Without any, use '
            '"requantize", or "keep" for plain LoRA. The model is left as it was.'
        )
    if calibration is not None and strategy not in TAKING_CALIBRATION and not (tune_epochs or has_budget):
        raise ValueError(
            f'strategy={strategy!r} takes no calibration data; "calibrated" and "append" do, and any that rounds with '
            "tune_epochs=. The model is left as it was."
        )
    if isinstance(calibration, Calibration) and calibration.resume_folder is not None:
        raise ValueError(
            "resume_folder is for quantize_model: an interrupted merge starts from the beginning. Remove it from the "
            "Calibration. The model is left as it was."
        )


def _checked_targets(
    peft_model: PeftModel, names: list[str], strategy: Strategy, *, needs_unmerged: bool, is_unloaded: bool
) -> list[MergeTarget]:
    """The layers to merge; ValueError if ``strategy`` does not support them, or if they could not be restored.

    Layers of PEFT's other tuners that are already merged are left to PEFT.
    """
    targets = merge_targets(peft_model, names)
    for target in targets:
        kind, possible = type(target.module).__name__, target.source.possible_strategies()
        if strategy not in possible:
            raise ValueError(
                f"{target.name}: strategy={strategy!r} is for LoRA on quantized layers, and this is a {kind}. Choose "
                f"one of {possible}. The model is left as it was."
            )
        if target.source.knows_unmerged_weight or not target.module.merged:
            continue
        if needs_unmerged or (strategy == "dense" and target.is_peft_tuner):
            raise ValueError(
                f"{target.name}: {target.module.merged_adapters} are merged already, and the unmerged weight is "
                'needed for evaluate_on and for strategy="dense". Call unmerge_adapter() first, or load the adapter '
                "onto its base again. The model is left as it was."
            )
    targets = [target for target in targets if not (target.is_peft_tuner and target.module.merged)]
    if not targets and strategy not in RULES_FOR_ANY_DELTA:
        raise ValueError(
            f'strategy={strategy!r} is for adapters on quantized layers, and {names} lie on none. Use "auto", which '
            "merges them as PEFT does. The model is left as it was."
        )
    is_undone = all(target.source.knows_unmerged_weight for target in targets)
    if not is_unloaded and not (is_undone and isinstance(peft_model.base_model, LoraModel)):
        raise ValueError(
            "unload=False is for LoRA: other tuners' merges into quantized layers cannot be undone bit for bit. "
            "Keep a copy of the model instead. The model is left as it was."
        )
    return targets


def _score(
    metric: Callable[[nn.Module], float] | None,
    peft_model: PeftModel,
    targets: Sequence[MergeTarget],
    names: list[str],
    *,
    is_merged: bool = False,
    progress: bool,
) -> float | None:
    if metric is None:
        return None
    described = "Scoring the merged model" if is_merged else "Scoring the adapter"
    bar = tqdm(total=1, desc=described, unit="score", disable=not progress)
    with only_active(peft_model, targets, names), bar:
        score = score_of(metric, peft_model.get_base_model() if is_merged else peft_model)
        bar.update()
    return score


@contextmanager
def _all_or_nothing(targets: Sequence[MergeTarget]) -> Iterator[None]:
    """If anything fails inside, every target is restored."""
    before = [target.source.snapshot() for target in targets]
    try:
        yield
    except BaseException:
        restore(targets, before)
        raise


def _merge_dense_layers(peft_model: PeftModel, targets: Sequence[MergeTarget], names: list[str]) -> None:
    """PEFT's own merge of LoRA on dense layers; undone if it fails."""
    ours = {id(target.module) for target in targets}
    others = [
        module
        for module in peft_model.modules()
        if isinstance(module, LoraLayer) and id(module) not in ours and not module.merged
    ]
    try:
        with _without_already_merged_warning():
            cast(Any, peft_model.base_model).merge_adapter(adapter_names=names)
    except BaseException:
        for module in others:
            if module.merged:
                cast(Any, module).unmerge()
        raise


def _reports(targets: Sequence[MergeTarget]) -> tuple[LayerMergeReport, ...]:
    reports = (target.source.merge_report for target in targets if target.module.merged)
    return tuple(report for report in reports if report is not None)


def _warn_of_wider_metadata(report: MergeReport) -> None:
    wider = [layer for layer in report.layers if layer.strategy == "exact" and layer.bits_after > layer.bits_before]
    if wider:
        logger.warning(
            "%d of %d layers now keep scales and zeros in float32, %.2f more bits per weight (%s, ...): float16 zeros "
            "would lose more than 1 %% of the delta.",
            len(wider),
            len(report.layers),
            wider[0].bits_after - wider[0].bits_before,
            wider[0].name,
        )


def _unloaded(
    peft_model: PeftModel, targets: Sequence[MergeTarget], names: list[str], strategy: Strategy
) -> nn.Module:
    """The base model without PEFT's wrapper, with the adapters merged."""
    set_active(peft_model, targets, names)  # PEFT keeps the modules_to_save of active adapters
    for target in targets:
        if target.is_peft_tuner:  # some of PEFT's tuners (OSF) would merge a second time
            parent = target.name.rpartition(".")[0]
            is_wrapped = isinstance(peft_model.get_submodule(parent), AuxiliaryTrainingWrapper)  # trained tokens
            peft_model.set_submodule(parent if is_wrapped else target.name, target.source.current_base())
    with _without_already_merged_warning():
        model = peft_model.merge_and_unload(adapter_names=names)
    return dequantize_model(model) if strategy == "dense" else model


@contextmanager
def _without_already_merged_warning() -> Iterator[None]:
    """PEFT warns for every quantized layer, which is merged before its own merge visits all layers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged|Already following adapters were merged")
        yield
