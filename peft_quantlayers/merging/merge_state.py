"""What is merged into one layer, as values: a snapshot of the layer, what a merge writes, and the last merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..formats import QuantizedWeight
from .layer_report import LayerMergeReport


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything that merging changes in a layer at one moment. Holds tensors; only small ones are copies.

    Fields:
        base: the layer under the adapters.
        weight: of a quantized base.
        tensors: values of the other parameters of the base that adapters change, by name.
        parameters: all Parameters of a base that shares them with other layers.
        host_state: other state of the adapters' layer.
        merged_adapters: names.
        report: on the merge, or None.
        unmerged: the snapshot from before the first merge; None if nothing is merged.
    """

    base: nn.Module
    weight: QuantizedWeight | None
    tensors: dict[str, Tensor]
    parameters: dict[str, nn.Parameter | None]
    host_state: Any
    merged_adapters: tuple[str, ...]
    report: LayerMergeReport | None
    unmerged: Snapshot | None


@dataclass(frozen=True, kw_only=True)
class LayerWrite:
    """What a merge writes into a layer, in place of what was merged before.

    Fields:
        adapters: names of the adapters that are merged then.
        weight: for the quantized base; None to leave its weight alone.
        new_base: the layer that replaces the base; None to leave the base in its place.
        tensors: other parameters of the base (``bias``), with their new values.
        host_state: what the adapters' layer keeps for itself.
        report: on the merge; None where nothing was measured.
    """

    adapters: Sequence[str]
    weight: QuantizedWeight | None = None
    new_base: nn.Module | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    host_state: Any = None
    report: LayerMergeReport | None = None


@dataclass(kw_only=True)
class MergeState:
    """The merges of one layer.

    Attributes:
        report: on the last merge; None while nothing is merged.
        unmerged: the layer from before the first merge; None while nothing is merged.
        shares_base: whether another layer has the same Parameters, so that a merge must not write into them.
        tensor_names: the parameters of the base that adapters change, besides its quantized weight.
        n_writes: of the base, after the last merge.
        host_state: of the adapters' layer, after its own merge.
    """

    report: LayerMergeReport | None = None
    unmerged: Snapshot | None = None
    shares_base: bool = False
    tensor_names: tuple[str, ...] = ("bias",)
    n_writes: int = -1
    host_state: Any = None
