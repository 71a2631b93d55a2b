"""What is merged into one layer, as values: a snapshot of the layer, and the state of its last merge."""

from __future__ import annotations

from dataclasses import dataclass
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
