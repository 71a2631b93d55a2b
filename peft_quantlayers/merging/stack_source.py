"""Adapters on a stack of experts: merged expert by expert, so that one dense weight is in memory at a time."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..formats import QuantizedWeight
from ..layers.replace_stack import put_dense
from ..layers.stack import QuantizedStack
from ..layers.stack_branch import StackBranch
from .layer_report import LayerMergeReport, layer_report
from .merge_source import MergeSource
from .merge_state import LayerWrite, MergeState
from .planned_merge import MergePlan, MergeResult


class DenseExperts(nn.Module):
    """The fused parameter of a stack that was merged to dense weights, as the base under the adapters."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class StackSource(MergeSource):
    """A :class:`MergeSource` whose base is one stack of an experts module.

    Attributes:
        parameter_name: of the stack in :meth:`experts_module`.
    """

    kind = "expert"
    knows_unmerged_weight = True
    measures_outputs = False

    parameter_name: str

    def __init__(self) -> None:
        self.merging = MergeState()

    @abstractmethod
    def experts_module(self) -> nn.Module:
        """The architecture's experts module, which holds the stack."""

    @property
    def n_parts(self) -> int:
        return self.unmerged_stack().n_experts

    def called_module(self) -> nn.Module:
        """The stack itself, which its experts module calls."""
        return self.current_base()

    # ---- the base

    def current_base(self) -> nn.Module:
        base = getattr(self.experts_module(), self.parameter_name)
        return DenseExperts(base) if isinstance(base, nn.Parameter) else base

    def put_base(self, base: nn.Module) -> None:
        module, name = self.experts_module(), self.parameter_name
        if isinstance(base, DenseExperts):
            put_dense(module, name, base.weight)
        elif getattr(module, name) is not base:
            delattr(module, name)
            module.add_module(name, base)

    def unmerged_stack(self) -> QuantizedStack:
        """The quantized stack under the adapters, even while a merge has replaced it."""
        return cast(QuantizedStack, cast(Any, self.quantized_base()))

    @property
    def is_mergeable(self) -> bool:
        return isinstance(self.quantized_base(), QuantizedStack)

    # ---- merging

    def joined(self, merges: Iterable[tuple[MergePlan, MergeResult]]) -> LayerWrite:
        stack, reports = self.unmerged_stack(), list[LayerMergeReport]()

        def results() -> Iterator[MergeResult]:
            for plan, result in merges:
                reports.append(layer_report(plan, result))
                yield result

        merged = _merged_base(stack, results())
        report = _total(stack.layer_name, reports, merged)
        if isinstance(merged, QuantizedWeight):
            return LayerWrite(adapters=report.adapters, weight=merged.to(stack.device), report=report)
        return LayerWrite(adapters=report.adapters, new_base=merged, report=report)


def _merged_base(stack: QuantizedStack, results: Iterator[MergeResult]) -> nn.Module | QuantizedWeight:
    """The stack's new weight, or what replaces the stack, from the results for its experts, all of one kind."""
    first = next(results)
    rest = chain([first], results)
    if first.weight is None:
        dense = torch.empty(stack.shape, dtype=cast(Tensor, first.dense).dtype, device=stack.device)
        for expert, result in enumerate(rest):
            matrix = cast(Tensor, result.dense)
            dense[expert] = matrix.t() if stack.is_transposed else matrix
        return DenseExperts(nn.Parameter(dense, requires_grad=False))
    branches = []

    def weights() -> Iterator[QuantizedWeight]:
        for result in rest:
            if result.branch is not None:
                branches.append(result.branch)
            yield cast(QuantizedWeight, result.weight)

    weight = QuantizedWeight.stacked(weights(), stack.n_experts)
    if not branches:
        return weight
    merged = stack.with_weight(weight)
    merged.add_branch(StackBranch(*(torch.stack([getattr(branch, part) for branch in branches]) for part in "AB")))
    return merged


def _total(name: str, reports: Sequence[LayerMergeReport], merged: nn.Module | QuantizedWeight) -> LayerMergeReport:
    """One report on all experts of a stack."""
    energy = sum(report.delta_norm**2 for report in reports)
    strategies = [report.strategy for report in reports]

    def norm(field: str) -> float:
        return math.sqrt(sum(getattr(report, field) ** 2 for report in reports))

    def weighted(field: str, default: float) -> float:
        if not energy:
            return default
        return sum(getattr(report, field) * report.delta_norm**2 for report in reports) / energy

    are_measured = all(report.output_retained is not None for report in reports)
    if isinstance(merged, (QuantizedStack, QuantizedWeight)):
        bits = merged.bits_per_weight
    else:
        bits = 8.0 * next(merged.parameters()).dtype.itemsize
    return replace(
        reports[0],
        name=name,
        strategy=max(dict.fromkeys(strategies), key=strategies.count),
        n_weights=sum(report.n_weights for report in reports),
        bits_after=bits,
        weight_norm=norm("weight_norm"),
        delta_norm=norm("delta_norm"),
        error_norm=norm("error_norm"),
        delta_retained=weighted("delta_retained", 1.0),
        output_retained=weighted("output_retained", 1.0) if are_measured else None,
        output_noise=weighted("output_noise", 0.0) if are_measured else None,
    )
