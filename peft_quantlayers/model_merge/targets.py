"""The layers of a model to merge, each as a :class:`MergeSource`, whatever its kind of adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..integrations.private_peft import available_adapters
from ..layers import QuantizedEmbedding, QuantizedLinear
from ..lora.dense_stand_in import dense_stand_in_under
from ..merging import AdapterTraits, MergePlan, MergeSource, MergeState
from ..merging.merge_rules import RULES_FOR_ANY_DELTA, RULES_FOR_TABLES


@dataclass(frozen=True, kw_only=True)
class MergeTarget:
    """One layer to merge.

    Fields:
        name: of PEFT's layer in its model.
        module: PEFT's layer.
        source: plans, applies and undoes its merge: the module itself, or a :class:`TunerSource` for it.
    """

    name: str
    module: Any
    source: MergeSource

    @property
    def is_peft_tuner(self) -> bool:
        """Whether one of PEFT's other tuners made the layer: its own merge cannot be undone bit for bit."""
        return self.module is not self.source


class TunerSource(MergeSource):
    """Merges a layer of one of PEFT's other tuners (LoHa, OFT, IA3, ...) on a quantized layer."""

    merge_rules = RULES_FOR_ANY_DELTA
    knows_unmerged_weight = False

    def __init__(self, layer: BaseTunerLayer) -> None:
        self.layer: Any = layer
        self.merging = MergeState()
        self.merged_adapters = self.layer.merged_adapters  # PEFT's own list

    def plan(self, names: Sequence[str]) -> MergePlan:
        """As :meth:`MergeSource.plan`. PEFT merges them into a dense float32 stand-in; nothing else changes."""
        base, unmerged = self.quantized_base(), self.unmerged_snapshot()
        weight = self.unmerged_weight()
        before = base.method.dequantize(weight)
        with dense_stand_in_under(self.layer, before, unmerged.tensors.get("bias")) as stand_in:
            try:
                self.layer.merge(safe_merge=True, adapter_names=list(names))
            except ValueError as error:
                raise ValueError(f"{error}. The model is left as it was.") from None
            adapters = tuple(self.layer.merged_adapters)
        return MergePlan(
            layer_name=base.layer_name,
            adapters=AdapterTraits(names=adapters),
            weight=weight,
            before=before,
            target=stand_in.weight.data,
            tensors={} if stand_in.bias is None else {"bias": stand_in.bias.data},
            compute_dtype=base.compute_dtype,
            branch=base.branch,
        )

    def current_base(self) -> nn.Module:
        return self.layer.base_layer

    def put_base(self, base: nn.Module) -> None:
        self.layer.base_layer = base


class TableSource(TunerSource):
    """Merges any adapter on an embedding table, or trained tokens of a head; rows without a delta keep their bits."""

    merge_rules = RULES_FOR_TABLES
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
