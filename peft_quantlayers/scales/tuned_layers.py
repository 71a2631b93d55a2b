"""Layers of scale-only finetuning: a base layer computing with trained copies of some of its floating tensors.

May import layers, merging, and PEFT's public classes. Which layers and tensors those are is found in
``integrations/peft_scales.py``.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..formats import QuantizedWeight
from ..layers import QuantizedLinear
from ..merging import AdapterTraits, LayerWrite, MergePlan, MergeRule, MergeSource, MergeState


class TunedTensors(nn.Module):
    """Trainable copies of some tensors of one layer, under the same names.

    They stay float32 even if the model is converted to another dtype: rounding to float16 or bfloat16 would lose the
    optimizer's steps.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach().to(torch.float32, copy=True)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class QuantScalesLayer(nn.Module, BaseTunerLayer, MergeSource):
    """What all layers of scale-only finetuning share: adapters by name, one of them active, and exact merging.

    Attributes:
        quant_scales_tensors: the trained tensors of each adapter.
        layer_name: the module's name in its model, for messages.
        merging: the state of its merges.
    """

    adapter_layer_names = ("quant_scales_tensors",)
    kind = "exact weight"

    def __init__(self, base_layer: nn.Module, adapter_name: str, names: Iterable[str], *, layer_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer_name = layer_name
        self.quant_scales_tensors = nn.ModuleDict()
        self.merged_adapters = []
        self.merging = MergeState(tensor_names=tuple(name for name, _ in self.tensors_beside_weight()))
        self.update_layer(adapter_name, names)

    def update_layer(self, adapter_name: str, names: Iterable[str]) -> None:
        """Add an adapter that trains the tensors ``names``; it starts from the base's values, and frozen."""
        tuned = TunedTensors({name: self.base_layer.get_parameter(name) for name in names})
        self.quant_scales_tensors[adapter_name] = tuned.requires_grad_(False)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter the active one, trainable unless ``inference_mode``.

        Raises:
            ValueError: several adapters: they replace tensors, and a tensor has one value.
        """
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(
                f"adapters {list(adapter_names)} cannot be active together: each replaces the tensors of the base. "
                "Activate one of them."
            )
        super().set_adapter(adapter_names, inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the active adapter's tensors in it."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.quant_scales_tensors]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(*args, **kwargs)
        return self.forward_with(self.tuned_tensors(active[0]), *args, **kwargs)

    def tuned_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """The tensors of one adapter in the dtype that merging stores, differentiable."""
        tuned = self.quant_scales_tensors[adapter_name]
        return {name: tensor.to(self.merged_dtype(name)) for name, tensor in tuned.named_parameters()}

    def adapter_to_merge(self, adapter_names: list[str] | None = None) -> str | None:
        """The one adapter that ``merge`` would merge here; None if there is nothing to do.

        Raises:
            ValueError: several adapters, another one is merged, or the adapter holds NaN or Inf; names the layer.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        present = [name for name in wanted if name in self.quant_scales_tensors]
        new = [name for name in present if name not in self.merged_adapters]
        if not new:
            return None
        if len(present) > 1 or self.merged:
            raise ValueError(
                f"{self.layer_name}: cannot merge {new} with {[n for n in present if n not in new] or 'more'} "
                f"(merged already: {self.merged_adapters}): each adapter replaces the tensors of the base. Merge one, "
                "after unmerge_adapter() where one is merged."
            )
        for name, tensor in self.quant_scales_tensors[new[0]].named_parameters():
            if not torch.isfinite(tensor.to(self.merged_dtype(name))).all():
                raise ValueError(
                    f"{self.layer_name}.{name} of adapter {new[0]!r} holds NaN or Inf, and was not merged. "
                    "Train again with a smaller learning rate."
                )
        return new[0]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapter's tensors into the base layer, unrounded.

        Args:
            safe_merge: accepted as in PEFT; values that are not finite are always refused.
            adapter_names: the adapter to merge; None for the active one.

        Raises:
            ValueError: as :meth:`adapter_to_merge`; the layer is left as it was.
        """
        adapter_name = self.adapter_to_merge(adapter_names)
        if adapter_name is not None:
            with torch.no_grad():
                weight, tensors = self.merged_values(adapter_name)
            self.write_merge(LayerWrite(adapters=(adapter_name,), weight=weight, tensors=tensors))

    def unmerge(self) -> None:
        """Restore the tensors from before the merge, bit for bit.

        Raises:
            RuntimeError: the weight was written since; nothing is changed.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        self.refuse_what_others_wrote()
        self.undo_merge()

    @abstractmethod
    def forward_with(self, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with ``tensors`` in place of its own."""

    @abstractmethod
    def merged_dtype(self, name: str) -> torch.dtype:
        """Dtype in which a merged tensor is stored. The adapter computes in it too, so that both agree."""

    @abstractmethod
    def merged_values(self, adapter_name: str) -> tuple[QuantizedWeight | None, dict[str, Tensor]]:
        """The quantized weight with the adapter's tensors (None for a norm), and the adapter's other tensors."""

    @abstractmethod
    def tensors_beside_weight(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The parameters of the base that a merge may change, besides its quantized weight, by name."""

    def current_base(self) -> nn.Module:
        return self.base_layer

    def put_base(self, base: nn.Module) -> None:
        self.base_layer = base


class QuantScalesLinear(QuantScalesLayer):
    """Scale-only finetuning of a :class:`QuantizedLinear`: of its scales, zeros, codebooks or bias."""

    def __init__(self, base_layer: QuantizedLinear, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        layout = base_layer.spec.widened().tensor_layout(base_layer.out_features, base_layer.in_features)
        self._merged_dtypes = {name: entry.dtype for name, entry in layout.items()}

    def forward_with(self, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return torch.func.functional_call(self.base_layer, tensors, args, kwargs)

    def merged_dtype(self, name: str) -> torch.dtype:
        return self.quantized_base().bias.dtype if name == "bias" else self._merged_dtypes[name]

    def merged_values(self, adapter_name: str) -> tuple[QuantizedWeight | None, dict[str, Tensor]]:
        tuned = {name: tensor.detach().clone() for name, tensor in self.tuned_tensors(adapter_name).items()}
        others = {"bias": tuned.pop("bias")} if "bias" in tuned else {}
        if not tuned:
            return None, others
        weight = self.unmerged_weight()
        device = next(iter(tuned.values())).device
        tensors = {
            name: tuned.get(name, weight.tensors[name].to(device)).to(dtype)
            for name, dtype in self._merged_dtypes.items()
        }
        return replace(weight, spec=weight.spec.widened(), tensors=tensors), others

    def tensors_beside_weight(self) -> Iterable[tuple[str, nn.Parameter]]:
        bias = cast(QuantizedLinear, self.base_layer).bias
        return [] if bias is None else [("bias", bias)]

    def traits(self, names: Sequence[str]) -> AdapterTraits:
        return AdapterTraits(names=tuple(names), strategies=("exact",))

    def plan(self, names: Sequence[str], part: int = 0) -> MergePlan:
        """As :meth:`MergeSource.plan`; the target is the weight with the tuned tensors, unrounded.

        Raises:
            ValueError: as :meth:`adapter_to_merge`.
        """
        base, before = self.quantized_base(), self.unmerged_weight()
        present = [name for name in names if name in self.quant_scales_tensors]
        if present != self.merged_adapters:
            self.adapter_to_merge(present)
        exact, tensors = before, dict[str, Tensor]()
        for name in present:
            merged, tensors = self.merged_values(name)
            exact = before if merged is None else merged
        return MergePlan(
            layer_name=base.layer_name,
            adapters=self.traits(present),
            weight=before,
            before=base.method.dequantize(before),
            target=base.method.dequantize(exact),
            exact=exact,
            tensors=tensors,
            compute_dtype=base.compute_dtype,
            branch=base.branch,
        )


class QuantScalesNorm(QuantScalesLayer):
    """A norm layer with trained weight and bias, next to scale-only finetuning of the linears."""

    def forward_with(self, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return torch.func.functional_call(self.base_layer, tensors, args, kwargs)

    def merged_dtype(self, name: str) -> torch.dtype:
        return self.base_layer.get_parameter(name).dtype

    def merged_values(self, adapter_name: str) -> tuple[QuantizedWeight | None, dict[str, Tensor]]:
        return None, {name: tensor.detach().clone() for name, tensor in self.tuned_tensors(adapter_name).items()}

    def tensors_beside_weight(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self.base_layer.named_parameters()

    @property
    def is_mergeable(self) -> bool:
        return True

    def plan(self, names: Sequence[str], part: int = 0) -> MergePlan:
        """Raises NotImplementedError: a norm has no quantized weight, and is merged without a plan."""
        raise NotImplementedError(f"{self.layer_name} is a norm, which has no quantized weight.")

    def merge_by(self, rule: MergeRule, names: Sequence[str]) -> None:
        """Merge the adapter, whatever the rule: nothing is rounded."""
        self.merge(adapter_names=list(names))
