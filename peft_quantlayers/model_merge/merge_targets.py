"""The layers of a model to merge, each as a :class:`MergeSource`, whatever its kind of adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..formats import QuantSpec
from ..integrations.private_peft import available_adapters
from ..layers import QuantizedEmbedding, QuantizedLinear
from ..lora.dense_stand_in import plan_by_peft
from ..merging import MergePlan, MergeSource, MergeState
from ..merging.strategies import Kind


@dataclass(frozen=True, kw_only=True)
class MergeTarget:
    """One layer to merge.

    Fields:
        name: of PEFT's layer in its model.
        module: PEFT's layer.
        source: plans, applies and undoes its merge: the module itself, or a :class:`TunerSource` for it.
        spec: what its merged weight is stored as; None for as its weight is stored now.
    """

    name: str
    module: Any
    source: MergeSource
    spec: QuantSpec | None = None

    @property
    def is_left_to_owner(self) -> bool:
        """Whether the layer's owner has merged it, so that it stays as it is."""
        return self.source.is_merged_by_owner and self.module.merged


class TunerSource(MergeSource):
    """Merges a layer of one of PEFT's other tuners (LoHa, OFT, IA3, ...) on a quantized layer."""

    kind: ClassVar[Kind] = "any delta"
    can_change_bits = True
    is_merged_by_owner = True

    def __init__(self, layer: BaseTunerLayer) -> None:
        self.layer: Any = layer
        self.merging = MergeState()
        self.merged_adapters = self.layer.merged_adapters  # PEFT's own list

    def plan(self, names: Sequence[str], part: int = 0) -> MergePlan:
        """As :meth:`MergeSource.plan`. PEFT merges them into a dense float32 stand-in; nothing else changes."""
        return plan_by_peft(self, self.layer, self.layer.merge, names)

    def called_module(self) -> nn.Module:
        """PEFT's layer."""
        return self.layer

    def current_base(self) -> nn.Module:
        return self.layer.base_layer

    def put_base(self, base: nn.Module) -> None:
        self.layer.base_layer = base


class TableSource(TunerSource):
    """Merges any adapter on an embedding table, or trained tokens of a head; rows without a delta keep their bits."""

    kind = "table"
    can_change_bits = False
    measures_outputs = False  # its inputs are indices

    @property
    def is_mergeable(self) -> bool:
        return isinstance(self.quantized_base(), (QuantizedEmbedding, QuantizedLinear))


def merge_targets(model: nn.Module, names: Sequence[str]) -> list[MergeTarget]:
    """The layers with one of the adapters ``names`` on a quantized layer, and norms tuned with scales."""
    found = []
    for layer_name, module in model.named_modules():
        if not isinstance(cast(object, module), BaseTunerLayer) or not available_adapters(module).intersection(names):
            continue
        if isinstance(module, MergeSource):
            source: MergeSource = module
        else:
            base: object = module.get_base_layer()
            is_table = isinstance(base, QuantizedEmbedding) or bool(getattr(base, "sharing", ()))
            source = TableSource(module) if is_table else TunerSource(module)
        if source.is_mergeable:
            found.append(MergeTarget(name=layer_name, module=module, source=source))
    return found
