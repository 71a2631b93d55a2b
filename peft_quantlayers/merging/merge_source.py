"""The base class of layers whose adapters can be merged: it makes plans, and writes results into the layer.

Here is the one state machine of merging: apply, undo, snapshot, restore. Kinds of adapters differ in how they make a
plan, and in the state that their layer keeps besides the base.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..formats import QuantizedWeight, QuantSpec
from ..layers import QuantizedLinear
from ..layers.quantize_weight import named_errors
from ..layers.quantized_storage import QuantizedStorage
from .layer_report import LayerMergeReport, layer_report
from .merge_state import LayerWrite, MergeState, Snapshot
from .planned_merge import AdapterTraits, MergePlan, MergeResult, MergeRule
from .strategies import STRATEGIES, Kind


class MergeSource(ABC):
    """A layer whose adapters can be merged, and unmerged bit for bit.

    Attributes:
        merging: what is merged.
        merged_adapters: names; the list is changed in place.
        kind: of its adapters, by which the rules of the strategies are found.
        knows_unmerged_weight: whether the weight from before is known as well where a merge was called on the layer
            itself, which is then undone bit for bit.
        measures_outputs: whether the module's own result is that of the one layer, so that both can be compared.
        can_change_bits: whether a merge may store the weight in another number of bits.
        is_merged_by_owner: whether the adapters' layer is not of a class of ours, and merges them itself where it is
            called: such a merge is left as it is, and cannot be undone bit for bit.
    """

    merging: MergeState
    kind: ClassVar[Kind]
    knows_unmerged_weight: ClassVar[bool] = False
    measures_outputs: ClassVar[bool] = True
    can_change_bits: ClassVar[bool] = False
    is_merged_by_owner: ClassVar[bool] = False
    if TYPE_CHECKING:
        merged_adapters: list[str]

    @classmethod
    def possible_strategies(cls) -> tuple[str, ...]:
        """Names of the strategies that adapters of this kind can be merged by, on some layers at least."""
        return tuple(name for name, strategy in STRATEGIES.items() if strategy.supports(cls.kind))

    # ---- what a kind of adapter says

    @abstractmethod
    def plan(self, names: Sequence[str], part: int = 0) -> MergePlan:
        """The merge of the adapters ``names`` into one part, in place of what is merged now. Changes nothing.

        Raises:
            ValueError: the merged weight is not finite.
        """

    def traits(self, names: Sequence[str]) -> AdapterTraits:
        """What is known of the adapters ``names`` without a plan."""
        return AdapterTraits(names=tuple(names))

    @abstractmethod
    def current_base(self) -> nn.Module:
        """The layer under the adapters as it is now."""

    @abstractmethod
    def put_base(self, base: nn.Module) -> None:
        """Make ``base`` the layer under the adapters."""

    @property
    def n_parts(self) -> int:
        """Number of weights that are merged one after another: 1, or the experts of a stack."""
        return 1

    def called_module(self) -> nn.Module:
        """The module whose forward pass reads the inputs of the layer under the adapters."""
        return cast(nn.Module, self)

    def host_state(self) -> Any:
        """What merging changes in the adapters' layer, besides the base and the list of merged adapters."""
        return None

    def set_host_state(self, state: Any) -> None:  # noqa: B027  most kinds have none
        """Restore :meth:`host_state`."""

    @property
    def is_mergeable(self) -> bool:
        """Whether there is a quantized weight to merge into. Other layers are merged by who owns the adapters."""
        return isinstance(self.quantized_base(), QuantizedLinear)

    # ---- merging

    def check_strategy(self, strategy: str, names: Sequence[str], spec: QuantSpec) -> None:
        """Raise what the rules of ``strategy`` would refuse, with the layer's name, before anything is computed.

        ``spec``: what the merged weight will be stored as.
        """
        if (check := STRATEGIES[strategy].check) is not None:
            with named_errors(self.quantized_base().layer_name):
                check(self.traits(names), spec)

    def rule_of(self, strategy: str) -> MergeRule:
        """The rule by which ``strategy`` merges adapters of this kind without data."""
        return STRATEGIES[strategy].rules[self.kind]

    def merge_by(self, rule: MergeRule, names: Sequence[str]) -> None:
        """Merge exactly these adapters, each part by ``rule``, in place of what was merged before.

        Raises:
            ValueError, NotImplementedError: what a plan or the rule refuses, with the layer's name; the layer is left
                as it was.
        """
        with torch.no_grad(), named_errors(self.quantized_base().layer_name):
            write = self.joined(self._merges(rule, names))
        self.write_merge(write)

    def _merges(self, rule: MergeRule, names: Sequence[str]) -> Iterator[tuple[MergePlan, MergeResult]]:
        for part in range(self.n_parts):
            plan = self.plan(names, part)
            yield plan, rule(plan)

    def joined(self, merges: Iterable[tuple[MergePlan, MergeResult]]) -> LayerWrite:
        """What the merges of all parts make of the layer. Changes nothing.

        ``merges`` is read once, and plans are not kept: their weights are dense.
        """
        ((plan, result),) = merges
        is_new = result.is_new_layer
        return LayerWrite(
            adapters=plan.adapters.names,
            weight=None if is_new else result.weight,
            new_base=_new_layer(self._here(self.unmerged_snapshot().base), result, plan.tensors.get("bias"))
            if is_new
            else None,
            tensors=plan.tensors,
            host_state=plan.host_state,
            report=layer_report(plan, result),
        )

    @torch.no_grad()
    def write_merge(self, write: LayerWrite) -> None:
        """Write a merge into the layer."""
        state, unmerged, base = self.merging, self.unmerged_snapshot(), write.new_base
        if base is None:
            base = self._here(unmerged.base)
            if state.shares_base:
                cast(QuantizedLinear, base).unshare_parameters()
            if write.weight is not None:
                cast(QuantizedStorage, base).quantized_weight = write.weight
            for name, tensor in write.tensors.items():
                parameter = base.get_parameter(name)
                parameter.data = tensor.to(parameter.dtype)
        self.put_base(base)
        state.unmerged, state.report, state.host_state = unmerged, write.report, write.host_state
        state.n_writes = getattr(base, "n_writes", -1)
        self.merged_adapters[:] = write.adapters

    def undo_merge(self) -> None:
        """Restore the layer from before the first merge, bit for bit. Does nothing if nothing is merged."""
        if self.merging.unmerged is not None:
            self.restore(self.merging.unmerged)

    def forget_merge(self) -> None:
        """Leave undoing to the owner of the adapters, who subtracts the deltas from the current weight."""
        self.set_host_state(self.merging.host_state)
        self.merging.unmerged, self.merging.report = None, None

    def snapshot(self) -> Snapshot:
        """What :meth:`restore` needs to undo every later merge of this layer."""
        base, state = self.current_base(), self.merging
        tensors = {name: getattr(base, name, None) for name in state.tensor_names}
        return Snapshot(
            base=base,
            weight=base.quantized_weight if isinstance(base, QuantizedStorage) else None,
            tensors={name: tensor.data.clone() for name, tensor in tensors.items() if tensor is not None},
            parameters=dict(base._parameters) if state.shares_base else {},
            host_state=self.host_state(),
            merged_adapters=tuple(self.merged_adapters),
            report=state.report,
            unmerged=state.unmerged,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Restore the layer to ``snapshot``, on its current device."""
        device = next(self.current_base().parameters()).device
        base = snapshot.base.to(device)
        dtypes = {name: base.get_parameter(name).dtype for name in snapshot.tensors}
        base._parameters.update(snapshot.parameters)
        if snapshot.weight is not None:
            cast(QuantizedStorage, base).quantized_weight = snapshot.weight.to(device)
        for name, tensor in snapshot.tensors.items():
            base.get_parameter(name).data = tensor.to(device, dtypes[name])
        self.put_base(base)
        self.set_host_state(snapshot.host_state)
        self.merging.unmerged, self.merging.report = snapshot.unmerged, snapshot.report
        self.merging.n_writes = getattr(base, "n_writes", -1)
        self.merged_adapters[:] = snapshot.merged_adapters

    # ---- what is merged

    def quantized_base(self) -> QuantizedLinear:
        """The quantized layer under the adapters, even while a merge has replaced it by another one."""
        unmerged = self.merging.unmerged
        return cast(QuantizedLinear, self.current_base() if unmerged is None else unmerged.base)

    def unmerged_snapshot(self) -> Snapshot:
        """The layer without any merge."""
        return self.merging.unmerged or self.snapshot()

    def _here(self, base: nn.Module) -> nn.Module:
        """``base`` on the device where the layer is now."""
        return base.to(next(self.current_base().parameters()).device)

    def unmerged_weight(self) -> QuantizedWeight:
        """The quantized weight without any merge."""
        return cast(QuantizedWeight, self.unmerged_snapshot().weight)

    @property
    def is_written_by_others(self) -> bool:
        """Whether the merged weight is no longer the one that the last merge wrote."""
        base, unmerged = self.current_base(), self.merging.unmerged
        is_ours = unmerged is not None and base is unmerged.base
        return is_ours and isinstance(base, QuantizedStorage) and base.n_writes != self.merging.n_writes

    def refuse_what_others_wrote(self) -> None:
        """Raise RuntimeError if the weight was written since the merge: the one from before does not have that."""
        if self.is_written_by_others:
            raise RuntimeError(
                f"{self.quantized_base().layer_name}: its weights were written since {self.merged_adapters} were "
                "merged, and what was there before the merge does not have that. Keep the merged model "
                "(merge_and_unload), or load base and adapter again."
            )

    @property
    def merge_report(self) -> LayerMergeReport | None:
        """The report on the last merge of this layer; None while nothing is merged."""
        return self.merging.report

    def refresh_report(self, hessian: Tensor | None = None) -> MergePlan:
        """Update the report after the merged weight was tuned, and return the plan of the merge.

        ``hessian``: as in :class:`MergeResult`.
        """
        strategy = "calibrated" if self.merging.report is None else self.merging.report.strategy
        weight = self.quantized_base().quantized_weight
        with torch.no_grad():
            plan = self.plan(list(self.merged_adapters))
            self.merging.report = layer_report(plan, MergeResult(strategy=strategy, weight=weight, hessian=hessian))
        return plan


def _new_layer(unmerged: nn.Module, result: MergeResult, bias: Tensor | None) -> nn.Module:
    """The layer that replaces the one that is ``unmerged``; its bias is a copy."""
    base = cast(QuantizedLinear, unmerged)
    if (own := getattr(base, "bias", None)) is not None:
        bias = own.detach().clone() if bias is None else bias.to(own.dtype)
    if result.weight is None:
        parameter = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return base.dense_with(cast(Tensor, result.dense), parameter)
    layer = base.with_weight(result.weight, bias)
    if result.branch is not None:
        layer.add_branch(result.branch)
    return layer
