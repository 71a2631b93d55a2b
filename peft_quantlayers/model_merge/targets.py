"""Merging adapters that are not LoRA: those of PEFT's other tuners on quantized layers, and tuned scales.

Each layer gets the face that ``merge_back`` knows from :class:`LoraQuantizedLinear`. May import layers, the rules of
merging and PEFT's public classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..layers import QuantizedLinear
from ..lora.layer import LoraQuantizedLinear, MergeState, dense_stand_in, merge_report_of
from ..merging import rules
from ..merging.report import LayerMergeReport, layer_report
from ..merging.rules import MergePlan, MergeRule
from ..scales.layers import QuantScalesLayer

# What can be done without knowing more of an adapter than the weight that it gives.
TUNER_RULES: dict[str, MergeRule] = {
    "auto": rules.requantize,
    "requantize": rules.requantize,
    "dense": rules.dense,
}
# Tuned scales are merged as they are, whatever is asked for.
SCALES_STRATEGIES = (*TUNER_RULES, "exact")


class MergeableLayer(Protocol):
    """A layer that can be merged and put back to any state it was in, bit for bit."""

    merge_report: LayerMergeReport | None

    @property
    def merged(self) -> bool: ...

    def unmerge(self) -> None: ...

    def merge_state(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


class TunerMerge:
    """Merges a layer of one of PEFT's other tuners (LoHa, OFT, IA3, ...) that lies on a quantized layer."""

    def __init__(self, layer: BaseTunerLayer) -> None:
        self.layer: Any = layer
        self.merge_report: LayerMergeReport | None = None
        self._unmerged: MergeState | None = None

    @property
    def merged(self) -> bool:
        """Whether an adapter is merged."""
        return self.layer.merged

    def merge_with(self, rule: MergeRule, names: list[str]) -> None:
        """Merge exactly these adapters by ``rule``; nothing is merged yet.

        Raises:
            ValueError: the merged weight is not finite; the layer is left as it was.
        """
        state = self.merge_state()
        with torch.no_grad():
            plan = self._plan(names)
            merged = rule(plan)
            report = merge_report_of(plan, merged)
        if isinstance(merged, nn.Module):
            self.layer.base_layer = merged
        else:
            plan.base.quantized_weight = merged
            if plan.bias is not None:
                plan.base.bias.data = plan.bias.to(plan.base.bias.dtype)
        self._unmerged, self.merge_report = state, report
        self.layer.merged_adapters[:] = plan.adapters

    def _plan(self, names: list[str]) -> MergePlan:
        """The merge of ``names``. PEFT merges them, into a dense float32 stand-in; nothing else changes."""
        base = cast(QuantizedLinear, self.layer.base_layer)
        before = base.method.dense(base.quantized_weight)
        self.layer.base_layer = stand_in = dense_stand_in(before, base.bias)
        try:
            self.layer.merge(safe_merge=True, adapter_names=names)
            adapters = tuple(self.layer.merged_adapters)
        except ValueError as error:
            raise ValueError(f"{base.layer_name}: {error}. The model is left as it was.") from None
        finally:
            self.layer.base_layer = base
            self.layer.merged_adapters.clear()
        return MergePlan(
            base=base,
            adapters=adapters,
            weight=base.quantized_weight,
            before=before,
            target=stand_in.weight.data,
            bias=None if stand_in.bias is None else stand_in.bias.data,
            left=None,
            right=None,
            group_change=None,
            adapter_dtype=torch.float32,
            caches={},
            strategies=(),
            is_aware=False,
            trained_aware=(),
        )

    def unmerge(self) -> None:
        """Put back what was there before the merge, bit for bit."""
        self.restore(self._unmerged)

    def finish(self) -> None:
        """Make what is merged final: ``merge_and_unload`` only unloads it. (PEFT's OSF would merge it once more.)"""
        self.layer.merge = lambda *args, **kwargs: None

    def merge_state(self) -> MergeState:
        """What :meth:`restore` needs. Holds tensors, no copies."""
        base = self.layer.base_layer
        bias = getattr(base, "bias", None)
        return MergeState(
            base=base,
            parameters={},
            weight=base.quantized_weight if isinstance(base, QuantizedLinear) else None,
            bias=None if bias is None else bias.data,
            caches={},
            merged_adapters=tuple(self.layer.merged_adapters),
            report=self.merge_report,
            unmerged=self._unmerged,
        )

    def restore(self, state: MergeState | None) -> None:
        """Put the layer back to where it was when :meth:`merge_state` gave ``state``."""
        if state is None:
            return
        base = cast(Any, state.base)
        if state.weight is not None:
            base.quantized_weight = state.weight
        if state.bias is not None:
            base.bias.data = state.bias
        self.layer.base_layer = base
        self._unmerged, self.merge_report = state.unmerged, state.report
        self.layer.merged_adapters[:] = state.merged_adapters


@dataclass(frozen=True)
class ScalesState:
    """The adapters that are merged into a layer with tuned scales; its merge can be done and undone exactly."""

    merged_adapters: tuple[str, ...]

    @property
    def unmerged(self) -> ScalesState | None:
        """The state before the merge; None where nothing is merged."""
        return ScalesState(()) if self.merged_adapters else None


class ScalesMerge:
    """Merges a layer of scale-only finetuning."""

    def __init__(self, layer: QuantScalesLayer) -> None:
        self.layer = layer
        self.merge_report: LayerMergeReport | None = None

    @property
    def merged(self) -> bool:
        """Whether an adapter is merged."""
        return self.layer.merged

    def merge_with(self, names: list[str], *, becomes_dense: bool = False) -> None:
        """Merge that of ``names`` which lies on this layer; ``becomes_dense`` is for the report."""
        base = self.layer.base_layer
        if not isinstance(base, QuantizedLinear):  # a norm
            return self.layer.merge(adapter_names=names)
        before = base.quantized_weight
        self.layer.merge(adapter_names=names)
        merged = base.method.dense(base.quantized_weight)
        bits_after = 8.0 * base.compute_dtype.itemsize if becomes_dense else base.quantized_weight.bits_per_weight
        self.merge_report = layer_report(
            base.layer_name,
            list(self.layer.merged_adapters),
            method=base.spec.method,
            before=base.method.dense(before),
            target=merged,
            merged=merged,
            bits=(before.bits_per_weight, bits_after),
            strategies=("exact",),
        )

    def unmerge(self) -> None:
        """Put back what was there before the merge, bit for bit."""
        if self.merged:
            self.layer.unmerge()

    def merge_state(self) -> ScalesState:
        """What :meth:`restore` needs."""
        return ScalesState(tuple(self.layer.merged_adapters))

    def restore(self, state: ScalesState) -> None:
        """Put the layer back to where it was when :meth:`merge_state` gave ``state``."""
        if tuple(self.layer.merged_adapters) == state.merged_adapters:
            return
        self.unmerge()
        if state.merged_adapters:
            self.layer.merge(adapter_names=list(state.merged_adapters))


def tuner_layers(model: nn.Module, names: list[str]) -> dict[str, BaseTunerLayer]:
    """Layers with one of the adapters ``names`` on a quantized layer, and norms tuned with scales; by name."""
    found = {}
    for layer_name, layer in model.named_modules():
        if not isinstance(cast(object, layer), BaseTunerLayer):
            continue
        tuner = cast(Any, layer)
        base = tuner.quantized_base() if isinstance(layer, LoraQuantizedLinear) else tuner.base_layer
        if not isinstance(base, QuantizedLinear) and not isinstance(layer, QuantScalesLayer):
            continue
        if tuner._get_available_adapters().intersection(names):
            found[layer_name] = tuner
    return found
