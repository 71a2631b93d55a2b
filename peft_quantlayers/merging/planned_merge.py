"""Values that describe the merge of a delta into one quantized weight, and its result. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..formats import QuantizedWeight, QuantSpec
from ..layers import LowRankBranch
from ..methods import QuantMethod, get_method


@dataclass(frozen=True, kw_only=True)
class AdapterTraits:
    """What is known of the adapters in a plan, besides their delta.

    Fields:
        names: of the adapters.
        dtype: of their parameters.
        strategies: the strategies that fit them, besides those that fit any; see
            :func:`.strategies.fitting_strategies`.
        is_merge_aware: all were trained through the rounding of this very weight.
        trained_merge_aware: those that were trained through a rounding, of this weight or another.
        can_be_qalora: QA-LoRA adapters, which merge exactly, can be trained on this weight.
    """

    names: tuple[str, ...]
    dtype: torch.dtype = torch.float32
    strategies: tuple[str, ...] = ()
    is_merge_aware: bool = False
    trained_merge_aware: tuple[str, ...] = ()
    can_be_qalora: bool = False

    @property
    def lossless_strategy(self) -> str:
        """The strategy, quoted, that loses nothing of these adapters."""
        if self.is_merge_aware:
            return '"aware"'
        return '"keep"' if "keep" in self.strategies else '"dense"'


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """One quantized weight and the delta that is to be merged into it.

    Fields:
        layer_name: of the layer, for messages.
        part: which weight of the layer it is: 0, or the index of an expert in a stack.
        adapters: where the delta comes from.
        weight: the quantized weight without any adapter.
        before, target: that weight and the one with the delta, (out_features, in_features), float32.
        tensors: other parameters of the layer that the adapters change (``bias``), with their new values, float32.
        left, right: ``target - before == left @ right``, (out_features, r) and (r, in_features), float32; None where
            the delta is no such product.
        group_delta: the delta of each quantization group, (out_features, n_groups), float32; None where the delta is
            not constant in the groups.
        exact: the quantized weight that equals the target without rounding, if the source has one.
        compute_dtype: of the layer.
        branch: the layer's own low-rank branch, which is not in ``weight``, or None.
        host_state: what the adapters' layer keeps for itself once this is merged; not read here.
    """

    layer_name: str
    adapters: AdapterTraits
    weight: QuantizedWeight
    before: Tensor
    target: Tensor
    part: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    left: Tensor | None = None
    right: Tensor | None = None
    group_delta: Tensor | None = None
    exact: QuantizedWeight | None = None
    compute_dtype: torch.dtype = torch.float32
    branch: LowRankBranch | None = None
    host_state: Any = None

    @property
    def method(self) -> QuantMethod:
        """The quantization method of the weight."""
        return get_method(self.weight.spec.method)

    @property
    def delta(self) -> Tensor:
        """``target - before``."""
        return self.target - self.before

    def delta_rows(self, rows: slice) -> Tensor:
        """Rows of the delta, (n, in_features), float32; the same bits that merge-aware training computes."""
        if self.left is None or self.right is None:
            return self.target[rows] - self.before[rows]
        return self.left[rows] @ self.right


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """What a layer holds after a merge.

    Fields:
        strategy: the one that was used; never "auto".
        weight: its quantized weight; None for a dense layer.
        dense: the weight of a dense layer, (out_features, in_features), in its dtype, the layer's branch included.
        branch: the low-rank branch of a new layer with ``weight``; None to leave the layer's own.
        hessian: second moment of the layer's inputs, (in_features, in_features), by which the weight was chosen; None
            without data. The report says what the outputs retain under it.
    """

    strategy: str
    weight: QuantizedWeight | None = None
    dense: Tensor | None = None
    branch: LowRankBranch | None = None
    hessian: Tensor | None = None

    @property
    def is_new_layer(self) -> bool:
        """Whether another layer replaces the quantized one, instead of another weight in it."""
        return self.weight is None or self.branch is not None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, a new branch included."""
        if self.weight is None:
            assert self.dense is not None
            return 8.0 * self.dense.dtype.itemsize
        branch_bits = 0 if self.branch is None else 8 * self.branch.nbytes
        return self.weight.bits_per_weight + branch_bits / (self.weight.out_features * self.weight.in_features)

    def merged(self, plan: MergePlan) -> Tensor:
        """The weight that approximates ``plan.target``, without the branch that the layer had; float32."""
        own = 0.0 if plan.branch is None else plan.branch.dense()
        if self.weight is None:
            assert self.dense is not None
            return self.dense.float() - own
        merged = get_method(self.weight.spec.method).dequantize(self.weight)
        return merged if self.branch is None else merged + self.branch.dense() - own


MergeRule = Callable[[MergePlan], MergeResult]


@dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """What data said of the inputs of a layer.

    Fields:
        hessian: their second moment, (in_features, in_features), float32.
        target: the weight that makes up for the errors of the layers before this one, in place of the plan's, shaped
            like it; None where nothing is known of them.
    """

    hessian: Tensor
    target: Tensor | None = None


# A rule with data; the spec is what the merged weight is stored as.
DataRule = Callable[[MergePlan, QuantSpec, LayerInputs], MergeResult]
