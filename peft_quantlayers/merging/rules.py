"""Rules of merging: what one layer becomes when adapters are merged into it. Pure functions of a plan.

A rule takes a :class:`MergePlan` and gives the new weight, or a new layer in place of the quantized one; it changes
nothing itself. Applying the result, and taking it back, is the LoRA layer's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from ..formats import QuantizedWeight, QuantSpec
from ..layers import LowRankBranch, QuantizedLinear
from ..layers.replace import dense_in_place_of
from ..methods import get_method
from .report import change_coefficient

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """One layer with the adapters that are to be merged into it. Nothing has changed yet.

    Fields:
        base: the quantized layer. Its own weight may hold an earlier merge; ``weight`` does not.
        adapters: names of the adapters.
        weight: the quantized weight without any adapter.
        before, target: that weight and the one with the adapters' changes, (out_features, in_features), float32.
        bias: the bias with the adapters' changes, float32, or None.
        left, right: ``target - before == left @ right``, (out_features, r) and (r, in_features), float32; None where
            a LoRA variant is no such product.
        group_change: the change of each quantization group, (out_features, n_groups), float32; None where the
            change is not constant in the groups.
        adapter_dtype: of the adapters' parameters.
        caches: PEFT's caches as its own merge leaves them.
        strategies: the rules that fit these adapters, beside those that fit any; see :func:`fitting_strategies`.
        is_aware: all adapters were trained through the rounding of just this ``weight``.
        trained_aware: the adapters that were trained through a rounding, of this weight or another.
    """

    base: QuantizedLinear
    adapters: tuple[str, ...]
    weight: QuantizedWeight
    before: Tensor
    target: Tensor
    bias: Tensor | None
    left: Tensor | None
    right: Tensor | None
    group_change: Tensor | None
    adapter_dtype: torch.dtype
    caches: dict
    strategies: tuple[str, ...]
    is_aware: bool
    trained_aware: tuple[str, ...]

    def change_rows(self, rows: slice) -> Tensor:
        """Rows of the change, (n, in_features), float32; the same bits that merge-aware training computes."""
        if self.left is None or self.right is None:
            return self.target[rows] - self.before[rows]
        return self.left[rows] @ self.right

    @property
    def lossless(self) -> str:
        """The strategy, quoted, that loses nothing of these adapters."""
        if self.is_aware:
            return '"aware"'
        return '"keep"' if "keep" in self.strategies else '"dense"'


MergeRule = Callable[[MergePlan], QuantizedWeight | nn.Module]

# A change of which less than this arrives has met the end of the range of codes: a new grid may hold more of it.
MIN_KEPT_ON_GRID = 0.8
MIN_KEPT_ANEW = 0.95
# With so few bits, metadata included, a change that moves fewer bytes of codes than this part is far below a step:
# nearest codes would lose it.
MAX_FEW_BITS = 5.0
MIN_MOVED = 0.25


def exact(plan: MergePlan) -> QuantizedWeight:
    """The change folded into the offsets of the groups: no code is rounded.

    Raises:
        ValueError: the change is not constant in the layer's groups.
    """
    if plan.group_change is None:
        raise ValueError(
            f"{plan.base.layer_name}: adapters {list(plan.adapters)} cannot be merged exactly: their change differs "
            "from weight to weight. On HQQ train with LoraConfig(use_qalora=True, qalora_group_size=<group_size>); or "
            f'use strategy="requantize" or {plan.lossless}.'
        )
    return plan.base.method.shifted(plan.weight, plan.group_change, name=plan.base.layer_name)


def fitting_strategies(spec: QuantSpec, *, is_plain: bool, has_bias: bool, is_qalora: bool) -> tuple[str, ...]:
    """Strategies beside "requantize" and "dense" that a layer of LoRA can be merged with.

    Args:
        spec: of the layer's weight.
        is_plain: the change is the product of two factors.
        has_bias: an adapter changes the bias (``lora_bias``), which merge-aware training does not know.
        is_qalora: the change is constant in each group.
    """
    method = get_method(spec.method)
    fitting = {
        "exact": is_qalora,
        "aware": is_plain and not has_bias,
        "keep": is_plain,
        "calibrated": method.can_use_hessian(spec),
        "append": _can_be_extended(spec),
    }
    return tuple(name for name, fits in fitting.items() if fits)


def _can_be_extended(spec: QuantSpec) -> bool:
    try:
        spec.extended()
    except NotImplementedError:
        return False
    return True


def on_grid(plan: MergePlan) -> QuantizedWeight:
    """The change rounded into the codes on the grid that the weight has, as merge-aware training does it."""
    return plan.base.method.merged(plan.weight, plan.change_rows, name=plan.base.layer_name)


def aware(plan: MergePlan) -> QuantizedWeight:
    """:func:`on_grid` for adapters that were trained through it: the outputs stay as they are.

    Raises:
        ValueError: an adapter was not trained merge-aware, or on another weight.
    """
    if not plan.is_aware:
        can_be = "aware" in plan.strategies
        trained = "Call peft_quantlayers.enable_merge_aware(model) before training them, or m" if can_be else "M"
        raise ValueError(
            f"{plan.base.layer_name}: adapters {list(plan.adapters)} were not trained merge-aware on this weight. "
            f'{trained}erge with another strategy: "requantize" needs no data, {plan.lossless} loses nothing.'
        )
    return on_grid(plan)


def requantize(plan: MergePlan) -> QuantizedWeight:
    """:func:`on_grid`, or nearest codes on a new grid where those keep the change and err less.

    They keep nothing of a change that is far below a step, as those of adapters mostly are, and are not tried then;
    or, where quantizing anew ends in other codes altogether, they keep it under new noise.
    """
    base = plan.base
    kept = on_grid(plan)
    grid_part, grid_error = _kept_and_error(plan, kept)
    if grid_part >= MIN_KEPT_ON_GRID and _is_far_below_a_step(plan, kept):
        return kept
    anew = base.method.quantize(plan.target, base.spec, name=base.layer_name)
    anew_part, anew_error = _kept_and_error(plan, anew)
    if anew_part >= MIN_KEPT_ANEW and anew_error <= grid_error:
        return anew
    return anew if grid_part < MIN_KEPT_ON_GRID and anew_part > grid_part else kept


def _is_far_below_a_step(plan: MergePlan, merged: QuantizedWeight) -> bool:
    codes = plan.weight.spec.codes_name
    moved = (merged.tensors[codes] != plan.weight.tensors[codes]).float().mean()
    return plan.weight.bits_per_weight <= MAX_FEW_BITS and bool(moved < MIN_MOVED)


def append(plan: MergePlan) -> QuantizedWeight:
    """The target in the extended format, from the codes that are there and new ones for the change.

    Raises:
        NotImplementedError: the format has no room for more.
    """
    if not (plan.target - plan.before).any():
        return plan.weight
    spec = extended_spec(plan.weight.spec, name=plan.base.layer_name)
    return plan.base.method.quantize(plan.target, spec, name=plan.base.layer_name, start=plan.weight)


def extended_spec(spec: QuantSpec, *, name: str) -> QuantSpec:
    """``spec`` with room for a change to the weight of layer ``name``; NotImplementedError with the way out."""
    try:
        return spec.extended()
    except NotImplementedError as error:
        raise NotImplementedError(
            f'{name}: {error} strategy="append" is for AQLM. Use "calibrated" or "requantize"; "keep" holds the '
            "change of plain LoRA exactly."
        ) from None


def dense(plan: MergePlan) -> nn.Module:
    """A plain float layer in the base's compute dtype."""
    base = plan.base
    bias = None if plan.bias is None else nn.Parameter(plan.bias.to(base.bias.dtype), requires_grad=False)
    weight = plan.target if base.branch is None else plan.target + base.branch.dense()
    return dense_in_place_of(base, weight.to(base.compute_dtype), bias)


def keep(plan: MergePlan) -> QuantizedLinear:
    """A quantized layer with the same codes, and the change beside them as a low-rank branch.

    Raises:
        NotImplementedError: a LoRA variant whose change is no product of two factors.
    """
    base = plan.base
    if plan.left is None or plan.right is None:
        raise NotImplementedError(
            f'{base.layer_name}: strategy="keep" knows plain LoRA and rsLoRA. Use "exact" for QA-LoRA, '
            '"requantize", "calibrated" or "dense" for other variants.'
        )
    bias = None if plan.bias is None else plan.bias.to(base.bias.dtype)
    kept = type(base)(plan.weight, bias, compute_dtype=base.compute_dtype, layer_name=base.layer_name)
    left, right = plan.left, plan.right
    if base.branch is not None:
        left, right = torch.cat([base.branch.B.float(), left], dim=1), torch.cat([base.branch.A.float(), right])
    kept.add_branch(LowRankBranch(right.to(plan.adapter_dtype), left.to(plan.adapter_dtype)))
    kept.dense_type, kept.is_conv1d = base.dense_type, base.is_conv1d
    return kept.train(base.training)


def automatic(plan: MergePlan) -> QuantizedWeight:
    """:func:`exact` or :func:`aware` for adapters made for it, :func:`requantize` for any other."""
    if plan.is_aware:
        return aware(plan)
    if plan.trained_aware:
        _warn_of_other_rounding(plan.trained_aware)
    return requantize(plan) if plan.group_change is None else exact(plan)


@cache
def _warn_of_other_rounding(adapters: tuple[str, ...]) -> None:
    logger.warning(
        "adapters %s were trained merge-aware, but not all that is merged was, or not on the weights that are there: "
        "they are merged like any other. strategy='aware' refuses this instead.",
        list(adapters),
    )


def _kept_and_error(plan: MergePlan, merged: QuantizedWeight) -> tuple[float, float]:
    """The coefficient of the change in what ``merged`` changed, by least squares, at most 1; and the error's norm."""
    after = plan.base.method.dense(merged)
    kept = change_coefficient(plan.before, plan.target, after)
    return min(1.0, kept), float((after - plan.target).norm())
