"""What is merged into one layer, and the way back: applies results, and restores what was there to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor, nn

from ..formats import QuantizedWeight
from ..layers import QuantizedLinear
from ..layers.replace import dense_in_place_of
from .layer_report import LayerMergeReport
from .plan import MergePlan, MergeResult


class MergeHost(Protocol):
    """The adapters' layer around a base layer, as far as merging changes it."""

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged; changed in place."""
        ...

    def current_base(self) -> nn.Module:
        """The layer under the adapters as it is now."""
        ...

    def put_base(self, base: nn.Module) -> None:
        """Make ``base`` the layer under the adapters."""
        ...

    def host_state(self) -> Any:
        """What else of this layer merging changes, as a value."""
        ...

    def set_host_state(self, state: Any) -> None:
        """Put :meth:`host_state` back."""
        ...


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything that merging changes in a layer at one moment. Holds tensors; only small ones are copies.

    Fields:
        base: the layer under the adapters.
        weight: of a quantized base.
        tensors: values of the other parameters of the base that adapters change, by name.
        parameters: all Parameters of a base that shares them with other layers.
        host_state: of the :class:`MergeHost`.
        merged_adapters: names.
        report: on the merge, or None.
        unmerged: the snapshot from before the first merge; None where nothing is merged.
    """

    base: nn.Module
    weight: QuantizedWeight | None
    tensors: dict[str, Tensor]
    parameters: dict[str, nn.Parameter | None]
    host_state: Any
    merged_adapters: tuple[str, ...]
    report: LayerMergeReport | None
    unmerged: Snapshot | None


class MergeState:
    """The merges of one layer.

    Attributes:
        report: what the last merge did; None while nothing is merged.
        unmerged: the layer from before the first merge; None while nothing is merged.
        shares_base: whether another layer has the same Parameters, so that a merge must not write into them.
    """

    def __init__(self, host: MergeHost, tensor_names: tuple[str, ...] = ("bias",)) -> None:
        self.host = host
        self.tensor_names = tensor_names
        self.report: LayerMergeReport | None = None
        self.unmerged: Snapshot | None = None
        self.shares_base = False
        self._n_writes = -1  # of the base, after the last merge
        self._merged_host_state: Any = None

    @property
    def base(self) -> QuantizedLinear:
        """The quantized layer under the adapters, also while a merge has put another one in its place."""
        base = self.host.current_base() if self.unmerged is None else self.unmerged.base
        return cast(QuantizedLinear, base)

    @property
    def unmerged_or_now(self) -> Snapshot:
        """The layer without any merge."""
        return self.unmerged or self.snapshot()

    @property
    def is_written_by_others(self) -> bool:
        """Whether the merged weight is no longer the one that the last merge wrote."""
        base = self.host.current_base()
        return (
            self.unmerged is not None
            and isinstance(base, QuantizedLinear)
            and base is self.unmerged.base
            and base.n_writes != self._n_writes
        )

    def snapshot(self) -> Snapshot:
        """What :meth:`restore` needs to undo every later merge of this layer."""
        base = self.host.current_base()
        tensors = {name: getattr(base, name, None) for name in self.tensor_names}
        return Snapshot(
            base=base,
            weight=base.quantized_weight if isinstance(base, QuantizedLinear) else None,
            tensors={name: tensor.data.clone() for name, tensor in tensors.items() if tensor is not None},
            parameters=dict(base._parameters) if self.shares_base else {},
            host_state=self.host.host_state(),
            merged_adapters=tuple(self.host.merged_adapters),
            report=self.report,
            unmerged=self.unmerged,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Put the layer back to where it was at ``snapshot``; on the device that it is on now."""
        device = next(self.host.current_base().parameters()).device
        base = snapshot.base.to(device)
        dtypes = {name: base.get_parameter(name).dtype for name in snapshot.tensors}
        base._parameters.update(snapshot.parameters)
        if snapshot.weight is not None:
            cast(QuantizedLinear, base).quantized_weight = snapshot.weight.to(device)
        for name, tensor in snapshot.tensors.items():
            base.get_parameter(name).data = tensor.to(device, dtypes[name])
        self.host.put_base(base)
        self.host.set_host_state(snapshot.host_state)
        self.unmerged, self.report = snapshot.unmerged, snapshot.report
        self._n_writes = getattr(base, "n_writes", -1)
        self.host.merged_adapters[:] = snapshot.merged_adapters

    def apply(self, plan: MergePlan, result: MergeResult, report: LayerMergeReport) -> None:
        """Make the layer what ``result`` says, in place of what was merged before."""
        self.write(plan.adapters.names, result, plan.tensors, host_state=plan.host_state)
        self.report = report

    def write(
        self,
        adapters: tuple[str, ...],
        result: MergeResult | None,
        tensors: dict[str, Tensor],
        *,
        host_state: Any = None,
    ) -> None:
        """Write a merged weight (None to leave the weight alone) and other parameters, without a report."""
        unmerged = self.unmerged_or_now
        base = unmerged.base.to(next(self.host.current_base().parameters()).device)
        if result is not None and result.is_new_layer:
            self.host.put_base(_new_layer(cast(QuantizedLinear, base), result, tensors.get("bias")))
        else:
            if self.shares_base:
                cast(QuantizedLinear, base).unshare_parameters()
            if result is not None and result.weight is not None:
                cast(QuantizedLinear, base).quantized_weight = result.weight
            for name, tensor in tensors.items():
                parameter = base.get_parameter(name)
                parameter.data = tensor.to(parameter.dtype)
            self.host.put_base(base)
        self.unmerged, self.report = unmerged, None
        self._merged_host_state, self._n_writes = host_state, getattr(base, "n_writes", -1)
        self.host.merged_adapters[:] = adapters

    def undo(self) -> None:
        """Put back what was there before the first merge, bit for bit. Does nothing where nothing is merged."""
        if self.unmerged is not None:
            self.restore(self.unmerged)

    def forget(self) -> None:
        """Leave the merge to its host, which undoes it in its own way."""
        self.host.set_host_state(self._merged_host_state)
        self.unmerged, self.report = None, None


def _new_layer(base: QuantizedLinear, result: MergeResult, bias: Tensor | None) -> nn.Module:
    """The layer that takes the place of ``base``; its bias is a copy."""
    if bias is None and base.bias is not None:
        bias = base.bias.detach().clone()
    bias = None if bias is None else bias.to(base.bias.dtype)
    if result.weight is None:
        parameter = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return dense_in_place_of(base, cast(Tensor, result.dense), parameter)
    layer = type(base)(
        result.weight,
        bias,
        compute_dtype=base.compute_dtype,
        layer_name=base.layer_name,
        dense_type=base.dense_type,
    )
    if result.branch is not None:
        layer.add_branch(result.branch)
    return layer.train(base.training)
