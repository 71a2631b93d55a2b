"""Layers of scale-only finetuning: a base layer computing with trained copies of some of its floating tensors.

May import layers and PEFT's public classes. Which layers and tensors those are is found in
``integrations/scales.py``.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Self, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..formats import QuantizedWeight
from ..layers import QuantizedLinear


class TunedTensors(nn.Module):
    """Trainable copies of some tensors of one layer, under the names that they have there.

    They are float32 and stay it, also where their model is converted to another dtype: steps of an optimizer are
    lost in the rounding of float16 and bfloat16.
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


class QuantScalesLayer(nn.Module, BaseTunerLayer):
    """What all layers of scale-only finetuning share: adapters by name, one of them active, and exact merging.

    Attributes:
        quant_scales_tensors: the trained tensors of each adapter.
        layer_name: the module's name in its model, for messages.
    """

    adapter_layer_names = ("quant_scales_tensors",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, names: Iterable[str], *, layer_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer_name = layer_name
        self.quant_scales_tensors = nn.ModuleDict()
        self.merged_adapters = []
        self._unmerged: Any = None
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
        """The one adapter that ``merge`` would merge here; None where there is nothing to do.

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
            safe_merge: accepted for PEFT's sake; values that are not finite are always refused.
            adapter_names: the adapter to merge; None for the active one.

        Raises:
            ValueError: as :meth:`adapter_to_merge`; the layer is left as it was.
        """
        adapter_name = self.adapter_to_merge(adapter_names)
        if adapter_name is None:
            return
        self._unmerged = self._stored()
        tuned = self.tuned_tensors(adapter_name)
        self._store({name: tensor.detach().clone() for name, tensor in tuned.items()})
        self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Put back the tensors from before the merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        self._restore(self._unmerged)
        self._unmerged = None
        self.merged_adapters.clear()

    @abstractmethod
    def forward_with(self, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with ``tensors`` in place of its own."""

    @abstractmethod
    def merged_dtype(self, name: str) -> torch.dtype:
        """Dtype in which a merged tensor is stored, and in which it is computed with before, so that both agree."""

    @abstractmethod
    def _stored(self) -> Any: ...

    @abstractmethod
    def _store(self, tensors: dict[str, Tensor]) -> None: ...

    @abstractmethod
    def _restore(self, stored: Any) -> None: ...


class QuantScalesLinear(QuantScalesLayer):
    """Scale-only finetuning of a :class:`QuantizedLinear`: of its scales, zeros, codebooks or bias."""

    def __init__(self, base_layer: QuantizedLinear, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        layout = base_layer.spec.widened().tensor_layout(base_layer.out_features, base_layer.in_features)
        self._merged_dtypes = {name: entry.dtype for name, entry in layout.items()}

    def forward_with(self, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return self.base_layer(*args, replaced=tensors, **kwargs)

    def merged_dtype(self, name: str) -> torch.dtype:
        return self._base().bias.dtype if name == "bias" else self._merged_dtypes[name]

    def _base(self) -> QuantizedLinear:
        return cast(QuantizedLinear, self.base_layer)

    def _stored(self) -> tuple[QuantizedWeight, Tensor | None]:
        base = self._base()
        return base.quantized_weight, None if base.bias is None else base.bias.data

    def _store(self, tensors: dict[str, Tensor]) -> None:
        base = self._base()
        tensors = dict(tensors)
        if "bias" in tensors:
            base.bias.data = tensors.pop("bias")
        if tensors:
            old = base.quantized_weight
            merged = {
                name: tensors.get(name, old.tensors[name]).to(dtype) for name, dtype in self._merged_dtypes.items()
            }
            base.quantized_weight = replace(old, spec=base.spec.widened(), tensors=merged)

    def _restore(self, stored: tuple[QuantizedWeight, Tensor | None]) -> None:
        base, (weight, bias) = self._base(), stored
        device = base.codes.device
        base.quantized_weight = weight.to(device)
        if bias is not None:
            base.bias.data = bias.to(device)


class QuantScalesNorm(QuantScalesLayer):
    """A norm layer with trained weight and bias, next to scale-only finetuning of the linears."""

    def forward_with(self, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return torch.func.functional_call(self.base_layer, tensors, args, kwargs)

    def merged_dtype(self, name: str) -> torch.dtype:
        return self.base_layer.get_parameter(name).dtype

    def _stored(self) -> dict[str, Tensor]:
        return {name: parameter.data for name, parameter in self.base_layer.named_parameters()}

    def _store(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.base_layer.get_parameter(name).data = tensor

    def _restore(self, stored: dict[str, Tensor]) -> None:
        for name, tensor in stored.items():
            parameter = self.base_layer.get_parameter(name)
            parameter.data = tensor.to(parameter.device)
