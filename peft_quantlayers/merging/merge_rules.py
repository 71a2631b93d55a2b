"""Rules of merging: what a quantized weight becomes when a delta is merged into it. Pure functions of a plan."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from typing import NoReturn

import torch

from ..formats import QuantizedWeight, QuantSpec
from ..layers import LowRankBranch
from .coefficients import retained_fraction
from .planned_merge import AdapterTraits, MergePlan, MergeResult

logger = logging.getLogger(__name__)

# If less than this fraction of the delta is retained on the grid, the delta leaves the range of codes: a new grid may
# hold more of it.
MIN_RETAINED_ON_GRID = 0.8
MIN_RETAINED_FROM_SCRATCH = 0.95
# With so few bits, metadata included, a delta that moves fewer codes than this fraction is far below a step: nearest
# codes would lose it. The fraction counts bytes of packed codes.
MAX_FEW_BITS = 5.0
MIN_MOVED = 0.25


def automatic(plan: MergePlan) -> MergeResult:
    """:func:`exact` or :func:`merge_aware` for adapters trained for it, :func:`requantize` for any other."""
    if plan.adapters.is_merge_aware:
        return merge_aware(plan)
    if plan.adapters.trained_merge_aware:
        _warn_of_other_rounding(plan.adapters.trained_merge_aware)
    if plan.exact is None and plan.group_delta is None:
        return requantize(plan)
    return exact(plan)


def exact(plan: MergePlan) -> MergeResult:
    """The target without rounding any code: as the source has it, or with the delta folded into the groups' offsets.

    Raises:
        ValueError: the delta is not constant in the layer's groups.
    """
    if plan.exact is not None:
        return MergeResult(strategy="exact", weight=plan.exact)
    if plan.group_delta is None:
        refuse_exact(plan.adapters)
    return MergeResult(strategy="exact", weight=plan.method.with_group_delta(plan.weight, plan.group_delta))


def on_grid(plan: MergePlan) -> QuantizedWeight:
    """The delta rounded into the codes on the weight's own grid, as in merge-aware training."""
    return plan.method.merged(plan.weight, plan.delta_rows)


def merge_aware(plan: MergePlan) -> MergeResult:
    """:func:`on_grid` for adapters that were trained through it: the outputs do not change.

    Raises:
        ValueError: an adapter was not trained merge-aware, or on another weight.
    """
    check_merge_aware(plan.adapters)
    return MergeResult(strategy="aware", weight=on_grid(plan))


def requantize(plan: MergePlan) -> MergeResult:
    """:func:`on_grid`, or nearest codes on a new grid where those retain the delta with a lower error.

    Nearest codes lose a delta that is much smaller than one step, which is the usual case for adapters, so they are
    not tried then. Where quantizing from scratch ends in other codes altogether, it retains the delta under new noise.
    """
    merged = on_grid(plan)
    retained, error = _retained_and_error(plan, merged)
    if retained < MIN_RETAINED_ON_GRID or not _is_far_below_a_step(plan, merged):
        from_scratch = plan.method.quantize(plan.target, plan.weight.spec)
        other_retained, other_error = _retained_and_error(plan, from_scratch)
        is_better = other_retained >= MIN_RETAINED_FROM_SCRATCH and other_error <= error
        if is_better or (retained < MIN_RETAINED_ON_GRID and other_retained > retained):
            merged = from_scratch
    return MergeResult(strategy="requantize", weight=merged)


def requantize_as(plan: MergePlan, spec: QuantSpec) -> MergeResult:
    """:func:`requantize` into another form of the same method, such as another number of bits.

    Nearest codes of the target on a new grid; or, where these lose much of the delta, what is left of the target is
    rounded into them with dither.
    """
    if spec == plan.weight.spec:
        return requantize(plan)
    nearest = plan.method.quantize(plan.target, spec)
    merged, (retained, _) = nearest, _retained_and_error(plan, nearest)
    if retained < MIN_RETAINED_FROM_SCRATCH and plan.delta.any():
        rest = plan.target - plan.method.dequantize(nearest)
        dithered = plan.method.merged(nearest, lambda rows: rest[rows])
        if _retained_and_error(plan, dithered)[0] > retained:
            merged = dithered
    return MergeResult(strategy="requantize", weight=merged)


def requantize_rows(plan: MergePlan) -> MergeResult:
    """:func:`requantize` of the rows that the delta changes, in a weight that has rows of their own."""
    changed = plan.delta.any(1).nonzero().flatten()
    if not len(changed):
        return MergeResult(strategy="requantize", weight=plan.weight)
    rows = replace(
        plan, weight=plan.weight.take_rows(changed), before=plan.before[changed], target=plan.target[changed]
    )
    new = requantize(rows).weight
    return MergeResult(
        strategy="requantize", weight=plan.weight.with_rows(changed, new, n_rows=plan.weight.out_features)
    )


def append(plan: MergePlan) -> MergeResult:
    """The target in the extended format: from the current codes, with new ones for the delta.

    Raises:
        NotImplementedError: the format cannot be extended.
    """
    weight = plan.weight
    if plan.delta.any():
        weight = plan.method.quantize(plan.target, extended_spec(plan.weight.spec), start=plan.weight)
    return MergeResult(strategy="append", weight=weight)


def extended_spec(spec: QuantSpec) -> QuantSpec:
    """``spec`` with room for a delta; NotImplementedError, with the alternatives, if the format has none."""
    try:
        return spec.extended()
    except NotImplementedError as error:
        raise NotImplementedError(
            f'{error} strategy="append" needs a format that can be extended. Use "calibrated" or "requantize"; "keep" '
            "holds the delta of plain LoRA exactly."
        ) from None


def dense(plan: MergePlan) -> MergeResult:
    """The target as a plain float weight in the layer's compute dtype."""
    weight = plan.target if plan.branch is None else plan.target + plan.branch.dense()
    return MergeResult(strategy="dense", dense=weight.to(plan.compute_dtype))


def keep(plan: MergePlan) -> MergeResult:
    """The same codes, with the delta as a low-rank branch.

    Raises:
        NotImplementedError: a LoRA variant whose delta is not a product of two factors.
    """
    if plan.left is None or plan.right is None:
        refuse_keep()
    left, right, dtype = plan.left, plan.right, plan.adapters.dtype
    if plan.branch is not None:
        left, right = torch.cat([plan.branch.B.float(), left], dim=1), torch.cat([plan.branch.A.float(), right])
    branch = LowRankBranch(right.to(dtype), left.to(dtype))
    return MergeResult(strategy="keep", weight=plan.weight, branch=branch)


# ---- what the rules refuse, which is known of the adapters before any plan


def check_exact(adapters: AdapterTraits) -> None:
    """Raise ValueError for adapters whose delta is not constant in the layer's groups."""
    if "exact" not in adapters.strategies:
        refuse_exact(adapters)


def refuse_exact(adapters: AdapterTraits) -> NoReturn:
    """Raise ValueError, with what else there is."""
    qalora = "Train with LoraConfig(use_qalora=True, qalora_group_size=<group_size>), or u"
    raise ValueError(
        f"adapters {list(adapters.names)} cannot be merged exactly: their delta is not constant in each quantization "
        f'group. {qalora if adapters.can_be_qalora else "U"}se strategy="requantize" or {adapters.lossless_strategy}.'
    )


def check_merge_aware(adapters: AdapterTraits) -> None:
    """Raise ValueError for adapters that were not trained merge-aware, or on another weight."""
    if adapters.is_merge_aware:
        return
    can_be = "aware" in adapters.strategies
    trained = "Call peft_quantlayers.enable_merge_aware(model) before training them, or m" if can_be else "M"
    raise ValueError(
        f"adapters {list(adapters.names)} were not trained merge-aware on this weight. {trained}erge with another "
        f'strategy: "requantize" needs no data, {adapters.lossless_strategy} loses nothing.'
    )


def check_keep(adapters: AdapterTraits) -> None:
    """Raise NotImplementedError for LoRA variants whose delta is not a product of two factors."""
    if "keep" not in adapters.strategies:
        refuse_keep()


def refuse_keep() -> NoReturn:
    """Raise NotImplementedError, with what else there is."""
    raise NotImplementedError(
        'strategy="keep" supports plain LoRA and rsLoRA. Use "exact" for QA-LoRA, "requantize", "calibrated" or '
        '"dense" for other variants.'
    )


def _is_far_below_a_step(plan: MergePlan, merged: QuantizedWeight) -> bool:
    name = plan.weight.spec.codes_name
    moved = (merged.tensors[name] != plan.weight.tensors[name]).float().mean()
    return plan.weight.bits_per_weight <= MAX_FEW_BITS and bool(moved < MIN_MOVED)


def _retained_and_error(plan: MergePlan, merged: QuantizedWeight) -> tuple[float, float]:
    """The fraction of the delta that ``merged`` retains, at most 1; and the norm of its error."""
    after = plan.method.dequantize(merged)
    retained = retained_fraction(plan.before, plan.target, after)
    return min(1.0, retained), float((after - plan.target).norm())


@cache
def _warn_of_other_rounding(adapters: tuple[str, ...]) -> None:
    logger.warning(
        "adapters %s were trained merge-aware, but on other quantized weights, or they are merged together with "
        "adapters that were not: they are merged like any others. strategy='aware' refuses this instead.",
        list(adapters),
    )
