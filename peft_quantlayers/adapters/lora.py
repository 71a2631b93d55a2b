"""The LoRA layer of all quantized linears. PEFT's own layer does the forward; here is what a quantized base changes.

May import layers and PEFT's public classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..formats import QuantizedWeight
from ..layers import QuantizedLinear
from ..layers.replace import dense_in_place_of


@dataclass(frozen=True, kw_only=True)
class LayerMergeReport:
    """What one merge did to one layer.

    Fields:
        name: module name of the base layer.
        adapters: adapters whose change is in the merged weight.
        bits_before, bits_after: stored bits per weight.
        weight_norm, change_norm, error_norm: Frobenius norms of the float target ``W + change``, of the change,
            and of what quantizing the target lost.
        change_kept: the part of the change that is in the merged weight: 1 for all of it, 0 for none. The
            coefficient of the change in ``merged - W``, by least squares; noise counts in ``error_norm`` only.
    """

    name: str
    adapters: tuple[str, ...]
    bits_before: float
    bits_after: float
    weight_norm: float
    change_norm: float
    error_norm: float
    change_kept: float

    @property
    def relative_error(self) -> float:
        """``error_norm / weight_norm``."""
        return self.error_norm / self.weight_norm if self.weight_norm else 0.0


def has_adapters(model: nn.Module) -> bool:
    """Whether a PEFT adapter of any kind sits in ``model``."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


@dataclass
class _Unmerged:
    """What ``unmerge`` puts back.

    ``caches`` are PEFT's from before the merge, ``merged_caches`` those after it. ``n_writes`` is the layer's count
    when we merged: another count says that somebody else has written to the weight since.
    """

    weight: QuantizedWeight
    bias: Tensor | None
    caches: dict
    merged_caches: dict = field(default_factory=dict)
    n_writes: int = -1


@dataclass(frozen=True)
class _Backend:
    """What PEFT's ``get_layer_status`` shows."""

    backend_name: str


class LoraQuantizedLinear(LoraLinear):
    """``lora.Linear`` on a :class:`QuantizedLinear`.

    Forward, mixed batches and all LoRA variants are PEFT's. Merging differs: the changes of all adapters are summed
    in float32 and quantized once, and the quantized weight from before the first merge is kept, so that ``unmerge``
    restores the same bits. Only where another adapter of a mixed model, or the user, has written to the merged weight
    does it subtract the changes, and quantize again, so that the other's write stays.

    Attributes:
        merge_report: what the last merge did to this layer; None while nothing is merged.
    """

    def __init__(
        self,
        base_layer: QuantizedLinear,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs,
    ) -> None:
        if config.fan_in_fan_out:
            warnings.warn(
                "fan_in_fan_out is set to True but the target module is a quantized linear layer, whose weight is "
                "(out_features, in_features). Setting fan_in_fan_out to False."
            )
            config.fan_in_fan_out = False
        self.merge_report: LayerMergeReport | None = None
        self._unmerged: _Unmerged | None = None
        super().__init__(base_layer, adapter_name, config, r=r, lora_alpha=lora_alpha, **kwargs)
        self.quantization_backend: Any = _Backend(f"quantlayers-{self._quantized_base().spec.method}")

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs) -> None:
        layer_name = self._quantized_base().layer_name
        if config.use_qalora:
            raise NotImplementedError(
                f"{layer_name}: use_qalora is not implemented for quantlayers yet, and would be ignored. Use plain "
                "LoRA, or GPTQ layers with PEFT's own QA-LoRA."
            )
        if config.init_lora_weights == "loftq":
            raise NotImplementedError(
                f'{layer_name}: init_lora_weights="loftq" fits the adapter to what quantizing lost, and this layer no '
                "longer has its float weight: the residual, and with it both matrices, would be zero and never train. "
                'Use "pissa" or "olora", which move weight into the adapter and requantize the rest on this grid.'
            )
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change that ``adapter`` makes to the weight, (out_features, in_features), float32."""
        lora_A, lora_B = (cast(nn.Linear, lora[adapter]) for lora in (self.lora_A, self.lora_B))
        return lora_B.weight.float() @ lora_A.weight.float() * self.scaling[adapter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Quantize the weight with the changes of the given adapters, and of those merged before, in it.

        Args:
            safe_merge: accepted for PEFT's sake; a merge that would give NaN or Inf is always refused.
            adapter_names: adapters to merge; None for the active ones.

        Raises:
            ValueError: the merged weight is not finite; names the layer, which is left as it was.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not new:
            return
        if not isinstance(self.get_base_layer(), QuantizedLinear):  # dequantized under its adapters
            return super().merge(safe_merge, new)
        if self._is_written_by_others():
            return super().merge(True, new)
        base = self._quantized_base()
        unmerged = self._unmerged_state()
        names = [*self.merged_adapters, *new]
        before, target, bias, caches = self._merged_floats(unmerged, names)
        with torch.no_grad():
            base.write_weight(target)
            if bias is not None:
                base.bias.data = bias.to(base.bias.dtype)
            self.merge_report = layer_report(
                base.layer_name,
                names,
                before=before,
                target=target,
                merged=base.dequantize(torch.float32),
                bits=(unmerged.weight.bits_per_weight, base.quantized_weight.bits_per_weight),
            )
        self._unmerged = replace(unmerged, merged_caches=caches, n_writes=base.n_writes)
        self.merged_adapters[:] = names

    def unmerge(self) -> None:
        """Put back the quantized weight and the bias from before the first merge, bit for bit.

        Where the weight was written since, the changes are subtracted from what it is now.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        if not isinstance(self.get_base_layer(), QuantizedLinear):
            return super().unmerge()
        base, unmerged = self._quantized_base(), self._unmerged
        if unmerged is None:
            raise RuntimeError(f"{base.layer_name}: merged, but the unmerged weight is gone. Load the model again.")
        if self._is_written_by_others():
            self._caches, self._unmerged, self.merge_report = unmerged.merged_caches, None, None
            return super().unmerge()
        device = base.codes.device
        base.quantized_weight = QuantizedWeight(
            spec=unmerged.weight.spec,
            out_features=unmerged.weight.out_features,
            in_features=unmerged.weight.in_features,
            tensors={name: tensor.to(device) for name, tensor in unmerged.weight.tensors.items()},
        )
        if unmerged.bias is not None:
            base.bias.data = unmerged.bias.to(device, base.bias.dtype)
        self._caches = unmerged.caches
        self._unmerged = self.merge_report = None
        self.merged_adapters.clear()

    def merged_linear(self, adapter_names: list[str]) -> tuple[nn.Linear | Conv1D, LayerMergeReport]:
        """A dense layer in the base's compute dtype with exactly these adapters merged; this layer is not changed.

        Raises:
            ValueError: the merged weight is not finite; names the layer.
        """
        base = self._quantized_base()
        unmerged = self._unmerged_state()
        names = [name for name in adapter_names if name in self.lora_A]
        before, target, bias, _ = self._merged_floats(unmerged, names)
        weight = target.to(base.compute_dtype)
        dense_bias = None if bias is None else nn.Parameter(bias.to(base.bias.dtype), requires_grad=False)
        dense = dense_in_place_of(base, weight, dense_bias)
        report = layer_report(
            base.layer_name,
            names,
            before=before,
            target=target,
            merged=weight.float(),
            bits=(unmerged.weight.bits_per_weight, 8.0 * base.compute_dtype.itemsize),
        )
        return dense, report

    def _quantized_base(self) -> QuantizedLinear:
        return cast(QuantizedLinear, self.get_base_layer())

    def _is_written_by_others(self) -> bool:
        """Whether the merged weight is no longer the one that our merge wrote."""
        return self._unmerged is not None and self._unmerged.n_writes != self._quantized_base().n_writes

    def _unmerged_state(self) -> _Unmerged:
        base = self._quantized_base()
        return self._unmerged or _Unmerged(
            weight=base.quantized_weight,
            bias=None if base.bias is None else base.bias.data.clone(),
            caches=dict(self._caches),
        )

    @torch.no_grad()
    def _merged_floats(self, unmerged: _Unmerged, names: list[str]) -> tuple[Tensor, Tensor, Tensor | None, dict]:
        """Weight before, weight and bias with the changes of ``names``, in float32; PEFT's caches. Changes nothing.

        PEFT merges one adapter after the other into ``base_layer``. A dense stand-in takes that place, so that
        every variant (DoRA, ...) and ``lora_bias`` follow PEFT's own rules.
        """
        base = self._quantized_base()
        device = base.codes.device
        before = base.method.dequantize(
            {name: tensor.to(device) for name, tensor in unmerged.weight.tensors.items()},
            unmerged.weight.spec,
            in_features=base.in_features,
            dtype=torch.float32,
        )
        stand_in = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        stand_in.weight = nn.Parameter(before.clone(), requires_grad=False)
        if unmerged.bias is not None:
            stand_in.bias = nn.Parameter(unmerged.bias.to(device, torch.float32), requires_grad=False)
        merged_adapters, caches, wrapped = list(self.merged_adapters), self._caches, self.base_layer
        self.base_layer, self._caches = stand_in, dict(unmerged.caches)
        self.merged_adapters.clear()
        try:
            super().merge(safe_merge=True, adapter_names=names)
            merged_caches = self._caches
        except ValueError as error:
            raise ValueError(
                f"{base.layer_name}: {error}. This layer was left as it was; layers that PEFT merged before it are "
                "put back bit for bit by unmerge_adapter(). peft_quantlayers.merge_back checks all layers first."
            ) from None
        finally:
            self.base_layer, self._caches = wrapped, caches
            self.merged_adapters[:] = merged_adapters
        return before, stand_in.weight.data, None if stand_in.bias is None else stand_in.bias.data, merged_caches


def layer_report(
    name: str,
    adapters: list[str],
    *,
    before: Tensor,
    target: Tensor,
    merged: Tensor,
    bits: tuple[float, float],
) -> LayerMergeReport:
    """The report on a layer whose weight was ``before``, should be ``target`` and became ``merged``; all float32."""
    change = target - before
    change_energy = change.square().sum()
    kept = ((merged - before) * change).sum() / change_energy if change_energy > 0 else torch.ones(())
    return LayerMergeReport(
        name=name,
        adapters=tuple(adapters),
        bits_before=bits[0],
        bits_after=bits[1],
        weight_norm=float(target.norm()),
        change_norm=float(change.norm()),
        error_norm=float((merged - target).norm()),
        change_kept=float(kept),
    )
