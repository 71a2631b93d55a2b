"""The LoRA layer of all quantized linears. PEFT's own layer does the forward; here is what differs on a quantized
base.

May import layers, merging, and PEFT's public classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from quantlayers_kernels.branch_products import add_branches
from quantlayers_kernels.direct_call import is_cpu_inference
from quantlayers_kernels.frozen_linear import FrozenLinear, lora_linears
from quantlayers_kernels.straight_through import straight_through

from ..integrations.private_peft import set_variant_caches, variant_caches
from ..layers import QuantizedLinear
from ..layers.call_effects import is_watched
from ..merging import AdapterTraits, MergePlan, MergeSource, MergeState
from ..merging.strategies import Kind
from ..old_names import OldName
from .merge_aware_config import check_fingerprint, fingerprint, fingerprints_of
from .merge_plan import lora_factors, lora_plan, lora_traits
from .plain_adapters import is_plain_input, plain_branches
from .qalora import MergeableQALoraVariant, check_config, group_delta
from .quantization_backend import QuantizedLinearBackend
from .rounded_weight import RoundedWeight


class SharedInput(Protocol):
    """Layers that are computed together: gives the result of one of them, and what is kept for it."""

    def __call__(self, layer: LoraQuantizedLinear, x: Tensor, frozen: FrozenLinear) -> Tensor: ...

    def found(self, layer: nn.Module, x: Tensor) -> Any: ...


def has_adapters(model: nn.Module) -> bool:
    """Whether a PEFT adapter of any kind sits in ``model``."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


class LoraQuantizedLinear(LoraLinear, MergeSource):
    """``lora.Linear`` on a :class:`QuantizedLinear`.

    Forward, mixed batches and all LoRA variants are PEFT's. Merging differs: the deltas of all adapters are summed
    in float32 and merged at once by one of the rules in ``merging/merge_rules.py``, and the quantized weight from
    before the first merge is kept, so that ``unmerge`` restores the same bits. Only where another adapter of a mixed
    model, or the user, has written to the merged weight does it subtract the deltas, and quantize again, so that the
    other's write stays.

    Attributes:
        merge_strategy: name of the rule that ``merge`` follows; see :func:`set_merge_strategy`.
        aware_adapters: merge-aware adapters, whose forward pass runs through the rounding of the merge, each with the
            fingerprint of the quantized weight that they are rounded against.
        merging: what is merged into this layer, and the way back.
        shared_input: the layers that are computed together with this one; see :func:`fuse_projections`.
    """

    as_frozen = OldName("fused_inputs")
    merge_state = OldName("snapshot")
    merge_with = OldName("merge_by")
    report_again = OldName("refresh_report")

    kind: ClassVar[Kind] = "lora"
    knows_unmerged_weight = True
    can_change_bits = True

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
        self.merge_strategy = "auto"
        self.aware_adapters: dict[str, str] = {}
        self.shared_input: SharedInput | None = None
        self.merging = MergeState()
        self._rounded = RoundedWeight()
        super().__init__(base_layer, adapter_name, config, r=r, lora_alpha=lora_alpha, **kwargs)
        self.quantization_backend = QuantizedLinearBackend(self.quantized_base())

    # ---- adapters

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs) -> None:
        base = self.quantized_base()
        if config.use_qalora:
            check_config(base, config)
        if config.arrow_config is not None:
            self._check_experts(config.arrow_config.task_adapter_names)
        if config.init_lora_weights == "loftq":
            raise NotImplementedError(
                f'{base.layer_name}: init_lora_weights="loftq" fits the adapter to the quantization error, and this '
                "layer no longer has its float weight. Leave it at True, and call "
                "peft_quantlayers.initialize_loftq(peft_model, float_model) before training. Without the float model "
                'use "pissa" or "olora", which move weight into the adapter and requantize the rest.'
            )
        recorded = fingerprints_of(config)
        # PiSSA and its like write to the base first, as they did before the training.
        writes_base = isinstance(config.init_lora_weights, str)
        if recorded is not None and not writes_base:
            check_fingerprint(recorded, base.layer_name, self.unmerged_weight(), adapter=adapter_name)
        self.merging.shares_base = self.merging.shares_base or config.layer_replication is not None
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        if recorded is not None:
            if writes_base:
                check_fingerprint(recorded, base.layer_name, self.unmerged_weight(), adapter=adapter_name)
            self.aware_adapters[adapter_name] = fingerprint(self.unmerged_weight())

    def _check_experts(self, names: list[str] | None) -> None:
        missing = [name for name in names or [] if name not in self.lora_A]
        if missing or not names:
            said = f"the experts {missing} are not on this layer" if missing else "there are no experts"
            raise ValueError(
                f"{self.quantized_base().layer_name}: arrow_config routes between adapters that are trained already, "
                f"and {said}. Use peft.tuners.lora.create_arrow_model(model, task_specific_adapter_paths=[...], "
                "arrow_config=...), which loads them; train each one as plain LoRA first."
            )

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.aware_adapters.pop(adapter_name, None)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs) -> LoraVariant | None:
        """PEFT's choice, and QA-LoRA, which PEFT resolves for GPTQ layers only."""
        if config.use_qalora:
            return MergeableQALoraVariant()
        return super().resolve_lora_variant(config=config, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The delta of ``adapter`` to the weight, (out_features, in_features), float32."""
        if isinstance(self.lora_variant.get(adapter), MergeableQALoraVariant):
            delta = group_delta(self, adapter)
            return delta.repeat_interleave(self.quantized_base().in_features // delta.shape[1], dim=1)
        left, right = lora_factors(self, [adapter])
        return left @ right

    # ---- forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's, keeping less for the backward pass; for merge-aware adapters what the merged layer will compute."""
        if not args and not kwargs:
            y = None if torch.is_grad_enabled() else self._inference_forward(x)
            # Also without gradients where dropout draws: both passes of a checkpoint must draw alike.
            y = self._fused_forward(x) if y is None else y
            if y is not None:
                return y
        if self.aware_adapters and not self.disable_adapters and not self.merged:
            active = self._active_here()
            if any(name in self.aware_adapters for name in active):
                return self._merge_aware_forward(x, active, **kwargs)
        return super().forward(x, *args, **kwargs)

    def _fused_forward(self, x: Tensor) -> Tensor | None:
        """The result by one autograd function; None where that is not possible."""
        frozen = self.fused_inputs(x)
        if frozen is None:
            return None
        return lora_linears(x, [frozen])[0] if self.shared_input is None else self.shared_input(self, x, frozen)

    def _inference_forward(self, x: Tensor) -> Tensor | None:
        """The result without gradients, adapters added in place; None where PEFT's forward must be called."""
        base = self._modules["base_layer"]
        if not isinstance(base, QuantizedLinear) or not self._can_add_branches(x):
            return None
        names = self._active_here()
        # A hook of the base may have kept its result, and so may a replaced forward.
        branches = None if not names or is_watched(base) else plain_branches(self, names, x)
        if branches is None:
            return None
        for branch in branches:
            if branch.dropout:
                return None
        if self.shared_input is not None and (base.shared_product is None or not is_cpu_inference(x)):
            self.shared_input.found(self, x)  # a graph that waits there waits for no other pass
        return add_branches(base.forward(x), x, branches)

    def _can_add_branches(self, x: Tensor) -> bool:
        if self.merged_adapters or self.disable_adapters or not is_plain_input(x):
            return False
        return not self.aware_adapters or not any(name in self.aware_adapters for name in self._active_here())

    def _active_here(self) -> list[str]:
        present = self._modules["lora_A"]._modules  # type: ignore[union-attr]
        return [name for name in self.active_adapters if name in present]

    def _merge_aware_forward(self, x: Tensor, active: list[str], **kwargs: Any) -> Tensor:
        base = self.quantized_base()
        aware = [name for name in active if name in self.aware_adapters]
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                f"{base.layer_name}: merge-aware adapters {sorted(aware)} change the rounding of the whole layer, so "
                "a mixed batch (adapter_names=...) cannot use them. Run one adapter at a time."
            )
        if aware != active:
            raise ValueError(
                f"{base.layer_name}: {sorted(set(active) - set(aware))} is active beside the merge-aware adapters "
                f"{sorted(aware)}. Call peft_quantlayers.enable_merge_aware for all of them, or activate one kind."
            )
        factors = lora_factors(self, active)
        if base.method.rounds_by_tiles:
            return base.forward_with_delta(x, *factors)
        rounded = self._rounded.weight(base, *factors, may_lag=self.training)
        return straight_through(base.forward_with(x, rounded, base.bias), x, *factors)

    def fused_inputs(self, x: Tensor) -> FrozenLinear | None:
        """Base and active adapters where they are a product and plain matrices beside it; None where they are not."""
        names, base = self._active_here(), self.get_base_layer()
        if (
            not names
            or not self._can_add_branches(x)
            or self.base_layer is not base  # another tuner's layer lies between
            or not isinstance(base, QuantizedLinear)
            or base.codes.device != x.device
        ):
            return None
        branches = plain_branches(self, names, x)
        return None if branches is None else base.fused_inputs(x, branches)

    # ---- merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the given adapters, together with those merged before, by the rule of ``merge_strategy``.

        Args:
            safe_merge: accepted for PEFT's sake; a merge that would give NaN or Inf is always refused.
            adapter_names: adapters to merge; None for the active ones.

        Raises:
            ValueError: the merged weight is not finite; names the layer, which is left as it was.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not new:
            return
        if self.is_written_by_others:
            return super().merge(True, new)
        if self.merging.unmerged is None and not isinstance(self.get_base_layer(), QuantizedLinear):
            return super().merge(safe_merge, new)  # dequantized under its adapters
        self.merge_by(self.rule_of(self.merge_strategy), [*self.merged_adapters, *new])

    def unmerge(self) -> None:
        """Put back the quantized weight and the bias from before the first merge, bit for bit.

        Where the weight was written since, the deltas are subtracted from what it is now.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
        elif self.is_written_by_others:
            self.forget_merge()
            super().unmerge()
        elif self.merging.unmerged is not None:
            self.undo_merge()
        else:
            base = self.get_base_layer()
            if isinstance(base, QuantizedLinear):
                raise RuntimeError(
                    f"{base.layer_name}: merged, but the unmerged weight is gone. Load the model again."
                )
            super().unmerge()

    def plan(self, names: Sequence[str], part: int = 0) -> MergePlan:
        """As :meth:`MergeSource.plan`; adapters are summed in the order in which they were added."""
        with torch.no_grad():
            return lora_plan(self, self._ordered(names), merge=super().merge, merge_aware=self.aware_adapters)

    def traits(self, names: Sequence[str]) -> AdapterTraits:
        return lora_traits(self, self._ordered(names), self.unmerged_weight(), merge_aware=self.aware_adapters)

    def _ordered(self, names: Sequence[str]) -> list[str]:
        """Those that are on this layer, as they were added: sums of floats depend on it, and so would the codes."""
        return [name for name in self.lora_A if name in names]

    def current_base(self) -> nn.Module:
        return self.get_base_layer()

    def put_base(self, base: nn.Module) -> None:
        """Make ``base`` the layer under the adapters; another tuner's layer between stays where it is."""
        if self.get_base_layer() is not base:
            self.base_layer = base

    def host_state(self) -> dict[str, Any]:
        """PEFT's caches of LoRA variants."""
        return variant_caches(self)

    def set_host_state(self, state: dict[str, Any]) -> None:
        set_variant_caches(self, state)
