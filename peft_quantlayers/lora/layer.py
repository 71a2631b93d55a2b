"""The LoRA layer of all quantized linears. PEFT's own layer does the forward; here is what a quantized base changes.

May import layers and PEFT's public classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from quantlayers_kernels.frozen_linear import Branch, FrozenLinear, lora_linears
from quantlayers_kernels.straight_through import straight_through

from ..formats import QuantizedWeight
from ..layers import QuantizedLinear
from ..layers.linear import is_watched
from ..merging import rules
from ..merging.report import LayerMergeReport, layer_report
from ..merging.rules import MergePlan, MergeRule, fitting_strategies
from .merge_aware_config import check_stamp, fingerprint, stamp_of
from .qalora import MergeableQALoraVariant, can_be_qalora, check_config, group_change
from .quantization_backend import QuantizedLinearBackend
from .rounded_weight import RoundedWeight

if TYPE_CHECKING:
    from .fused_projections import SharedInput

RULES: dict[str, MergeRule] = {
    "auto": rules.automatic,
    "exact": rules.exact,
    "aware": rules.aware,
    "requantize": rules.requantize,
    "append": rules.append,
    "dense": rules.dense,
    "keep": rules.keep,
}


def has_adapters(model: nn.Module) -> bool:
    """Whether a PEFT adapter of any kind sits in ``model``."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


@dataclass(frozen=True, kw_only=True)
class MergeState:
    """Everything that a merge changes in a LoRA layer, so that it can be put back bit for bit."""

    base: nn.Module
    parameters: dict[str, nn.Parameter | None]
    weight: QuantizedWeight | None
    bias: Tensor | None
    caches: dict
    merged_adapters: tuple[str, ...]
    report: LayerMergeReport | None
    unmerged: MergeState | None


class LoraQuantizedLinear(LoraLinear):
    """``lora.Linear`` on a :class:`QuantizedLinear`.

    Forward, mixed batches and all LoRA variants are PEFT's. Merging differs: the changes of all adapters are summed
    in float32 and merged at once by one of the rules in ``rules.py``, and the quantized weight from before the first
    merge is kept, so that ``unmerge`` restores the same bits. Only where another adapter of a mixed model, or the
    user, has written to the merged weight does it subtract the changes, and quantize again, so that the other's write
    stays.

    Attributes:
        merge_strategy: name of the rule that ``merge`` follows; see :func:`set_merge_strategy`.
        aware_adapters: adapters whose forward pass runs through the rounding of the merge, each with the fingerprint
            of the quantized weight that they are rounded against.
        merge_report: what the last merge did to this layer; None while nothing is merged.
        shared_input: the layers that are computed together with this one; see :func:`fuse_projections`.
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
        self.merge_strategy = "auto"
        self.aware_adapters: dict[str, str] = {}
        self.merge_report: LayerMergeReport | None = None
        self.shared_input: SharedInput | None = None
        self._shares_base = False  # with replicas of its layer
        self._rounded = RoundedWeight()
        self._unmerged: MergeState | None = None
        self._merged_caches: dict = {}  # PEFT's, as its own merge left them
        self._merged_n_writes = -1
        super().__init__(base_layer, adapter_name, config, r=r, lora_alpha=lora_alpha, **kwargs)
        self.quantization_backend = QuantizedLinearBackend(self.quantized_base())

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs) -> None:
        base = self.quantized_base()
        if config.use_qalora:
            check_config(base, config)
        if config.arrow_config is not None:
            self._check_experts(config.arrow_config.task_adapter_names)
        if config.init_lora_weights == "loftq":
            raise NotImplementedError(
                f'{base.layer_name}: init_lora_weights="loftq" fits the adapter to what quantizing lost, and this '
                "layer no longer has its float weight. Leave it at True, and call "
                "peft_quantlayers.initialize_loftq(peft_model, float_model) before training. Without the float model "
                'use "pissa" or "olora", which move weight into the adapter and requantize the rest.'
            )
        stamp = stamp_of(config)
        # PiSSA and its like write to the base first, as they did before the training.
        writes_base = isinstance(config.init_lora_weights, str)
        if stamp is not None and not writes_base:
            check_stamp(stamp, base.layer_name, self._unmerged_weight(), adapter=adapter_name)
        self._shares_base = self._shares_base or config.layer_replication is not None
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        if stamp is not None:
            if writes_base:
                check_stamp(stamp, base.layer_name, self._unmerged_weight(), adapter=adapter_name)
            self.aware_adapters[adapter_name] = fingerprint(self._unmerged_weight())

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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's, keeping less for the backward pass; for merge-aware adapters what the merged layer will compute."""
        frozen = None if args or kwargs else self.as_frozen(x)
        if frozen is not None:
            return lora_linears(x, [frozen])[0] if self.shared_input is None else self.shared_input(self, x, frozen)
        active = self._active_here()
        aware = set(active).intersection(self.aware_adapters)
        if self.disable_adapters or self.merged or not aware:
            return super().forward(x, *args, **kwargs)
        name = self.quantized_base().layer_name
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                f"{name}: merge-aware adapters {sorted(aware)} change the rounding of the whole layer, so a "
                "mixed batch (adapter_names=...) cannot use them. Run one adapter at a time."
            )
        if aware != set(active):
            raise ValueError(
                f"{name}: {sorted(set(active) - aware)} is active beside the merge-aware adapters {sorted(aware)}. "
                "Call peft_quantlayers.enable_merge_aware for all of them, or activate one kind."
            )
        base, factors = self.quantized_base(), self._factors(active)
        if base.method.rounds_by_tiles:
            return base.forward_with_update(x, *factors)
        rounded = self._rounded.tensors(base, *factors, may_lag=self.training)
        return straight_through(base(x, rounded), x, *factors)

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def as_frozen(self, x: Tensor) -> FrozenLinear | None:
        """Base and active adapters where they are a product and plain matrices beside it, and None where not."""
        names, base = self._active_here(), self.get_base_layer()
        if (
            not names
            or self.disable_adapters
            or self.merged
            or self.base_layer is not base  # another tuner's layer lies between
            or not isinstance(base, QuantizedLinear)
            or type(x) not in (Tensor, nn.Parameter)  # fake tensors, shards, ...
            or base.codes.device != x.device
            or x.is_meta
            or _is_transformed()
            or any(name in self.aware_adapters or not self._is_plain(name) for name in names)
        ):
            return None
        branches = [self._branch(name) for name in names]
        if len({branch.A.dtype for branch in branches}) > 1:
            return None
        if any(factor.device != x.device for branch in branches for factor in (branch.A, branch.B)):
            return None
        return base.as_frozen(x, branches)

    def _is_plain(self, name: str) -> bool:
        """Whether the adapter is two plain matrices, so that a product with their weights is all that they do."""
        A, B, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        return (
            name not in self.lora_variant
            and type(A) is type(B) is nn.Linear
            and A.bias is B.bias is None
            # Wrappers that shard or gather a module's weight work through hooks, or replace its Parameter.
            and type(A.weight) is type(B.weight) is nn.Parameter
            and A.weight.dtype == B.weight.dtype
            and type(dropout) in (nn.Identity, nn.Dropout)
            and not (is_watched(A) or is_watched(B) or is_watched(dropout))
            and getattr(self, "cast_input_dtype_enabled", True)
        )

    def _branch(self, name: str) -> Branch:
        A, B = (cast(nn.Linear, part[name]).weight for part in (self.lora_A, self.lora_B))
        dropout = self.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return Branch(A=A, B=B, scaling=self.scaling[name], dropout=p)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs) -> LoraVariant | None:
        """PEFT's choice, and QA-LoRA, which PEFT resolves for GPTQ layers only."""
        if config.use_qalora:
            return MergeableQALoraVariant()
        return super().resolve_lora_variant(config=config, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change that ``adapter`` makes to the weight, (out_features, in_features), float32."""
        if self._is_qalora(adapter):
            change = group_change(self, adapter)
            return change.repeat_interleave(self.quantized_base().in_features // change.shape[1], dim=1)
        left, right = self._factors([adapter])
        return left @ right

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
        if self._is_written_by_others():
            return super().merge(True, new)
        if self._unmerged is None and not isinstance(self.get_base_layer(), QuantizedLinear):
            return super().merge(safe_merge, new)  # dequantized under its adapters
        self.merge_with(RULES[self.merge_strategy], [*self.merged_adapters, *new])

    def merge_with(self, rule: MergeRule, adapter_names: list[str]) -> None:
        """Merge exactly these adapters by ``rule``, instead of what was merged before.

        Raises:
            ValueError: the merged weight is not finite; names the layer, which is left as it was.
        """
        with torch.no_grad():
            # In the order in which they were added: sums of floats depend on it, and so would the codes.
            plan = self._plan([name for name in self.lora_A if name in adapter_names])
            merged = rule(plan)
            report = merge_report_of(plan, merged)
        unmerged = self._unmerged or self.merge_state()
        base = plan.base
        if isinstance(merged, QuantizedWeight):
            if self._shares_base:
                base.own_parameters()
            base.quantized_weight = merged
            if plan.bias is not None:
                base.bias.data = plan.bias.to(base.bias.dtype)
            self._put(base)
        else:
            self.base_layer = merged
        self._unmerged, self.merge_report = unmerged, report
        self._merged_caches, self._merged_n_writes = plan.caches, base.n_writes
        self.merged_adapters[:] = plan.adapters

    @torch.no_grad()
    def report_again(self) -> MergePlan:
        """Renew ``merge_report`` after the merged weight was tuned, and give the plan of the merge."""
        plan = self._plan(list(self.merged_adapters))
        self.merge_report = merge_report_of(plan, plan.base.quantized_weight)
        return plan

    def unmerge(self) -> None:
        """Put back the quantized weight and the bias from before the first merge, bit for bit.

        Where the weight was written since, the changes are subtracted from what it is now.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        if self._is_written_by_others():
            self._caches, self._unmerged, self.merge_report = self._merged_caches, None, None
            return super().unmerge()
        if self._unmerged is not None:
            return self.restore(self._unmerged)
        base = self.get_base_layer()
        if isinstance(base, QuantizedLinear):
            raise RuntimeError(f"{base.layer_name}: merged, but the unmerged weight is gone. Load the model again.")
        super().unmerge()

    def merge_state(self) -> MergeState:
        """What :meth:`restore` needs to undo every later merge and unmerge of this layer. Holds tensors, no copies."""
        base = self.get_base_layer()
        bias = getattr(base, "bias", None)
        return MergeState(
            base=base,
            parameters=dict(base._parameters) if self._shares_base else {},
            weight=base.quantized_weight if isinstance(base, QuantizedLinear) else None,
            bias=None if bias is None else bias.data.clone(),
            caches=dict(self._caches),
            merged_adapters=tuple(self.merged_adapters),
            report=self.merge_report,
            unmerged=self._unmerged,
        )

    def restore(self, state: MergeState) -> None:
        """Put this layer back to where it was when :meth:`merge_state` gave ``state``; on the device it is on now."""
        device = next(self.get_base_layer().parameters()).device
        base = state.base.to(device)
        bias_dtype = None if state.bias is None else cast(nn.Linear, base).bias.dtype
        base._parameters.update(state.parameters)
        if state.weight is not None:
            cast(QuantizedLinear, base).quantized_weight = state.weight.to(device)
        if state.bias is not None:
            cast(nn.Linear, base).bias.data = state.bias.to(device, bias_dtype)
        self._put(base)
        self._caches = dict(state.caches)
        self._unmerged, self.merge_report = state.unmerged, state.report
        self._merged_n_writes = getattr(base, "n_writes", -1)
        self.merged_adapters[:] = state.merged_adapters

    def _put(self, base: nn.Module) -> None:
        """Make ``base`` the layer under the adapters; another tuner's layer between stays where it is."""
        if self.get_base_layer() is not base:
            self.base_layer = base

    def _is_written_by_others(self) -> bool:
        """Whether the merged weight is no longer the one that our merge wrote."""
        base = self.get_base_layer()
        return (
            self._unmerged is not None
            and isinstance(base, QuantizedLinear)
            and base is self._unmerged.base
            and base.n_writes != self._merged_n_writes
        )

    def quantized_base(self) -> QuantizedLinear:
        """The quantized layer under the adapters, also while a merge has put a dense one in its place."""
        return cast(QuantizedLinear, self.get_base_layer() if self._unmerged is None else self._unmerged.base)

    def _unmerged_weight(self) -> QuantizedWeight:
        return cast(QuantizedWeight, (self._unmerged or self.merge_state()).weight)

    def _is_qalora(self, adapter: str) -> bool:
        return isinstance(self.lora_variant.get(adapter), MergeableQALoraVariant)

    def _factors(self, names: list[str]) -> tuple[Tensor, Tensor]:
        """(out_features, r) and (r, in_features), float32, whose product is the sum of the changes of plain LoRA."""
        left = [cast(nn.Linear, self.lora_B[name]).weight.float() * self.scaling[name] for name in names]
        right = [cast(nn.Linear, self.lora_A[name]).weight.float() for name in names]
        return torch.cat(left, dim=1), torch.cat(right)

    def _group_change(self, names: list[str], group_size: int) -> Tensor | None:
        """Sum of the changes of each quantization group, if all adapters are QA-LoRA; (out_features, n_groups)."""
        if not names or not all(self._is_qalora(name) for name in names):
            return None
        n_groups = self.quantized_base().in_features // group_size
        changes = [group_change(self, name) for name in names]
        return torch.stack([each.repeat_interleave(n_groups // each.shape[1], dim=1) for each in changes]).sum(0)

    def _plan(self, names: list[str]) -> MergePlan:
        """The merge of ``names``. Changes nothing.

        PEFT merges one adapter after the other into ``base_layer``. A dense stand-in takes that place, so that
        every variant (DoRA, ...) and ``lora_bias`` follow PEFT's own rules.
        """
        base = self.quantized_base()
        state = self.merge_state()
        unmerged = self._unmerged or state
        device = next(self.get_base_layer().parameters()).device
        weight = cast(QuantizedWeight, unmerged.weight).to(device)
        before = base.method.dense(weight)
        stand_in = dense_stand_in(before, unmerged.bias)
        here, caches = self.base_layer, self._caches
        self.base_layer, self._caches = stand_in, dict(unmerged.caches)
        self.merged_adapters.clear()
        try:
            super().merge(safe_merge=True, adapter_names=names)
            merged_caches = self._caches
        except ValueError as error:
            raise ValueError(
                f"{base.layer_name}: {error}. Nothing was merged. Train the adapter again or load another."
            ) from None
        finally:
            self.base_layer, self._caches = here, caches
            self.merged_adapters[:] = state.merged_adapters
        is_plain = bool(names) and not any(name in self.lora_variant for name in names)
        left, right = self._factors(names) if is_plain else (None, None)
        change = None
        if any(self._is_qalora(name) for name in names):
            change = self._group_change(names, base.method.shift_group_size(base.spec, in_features=base.in_features))
        trained_aware = tuple(name for name in names if name in self.aware_adapters)
        prints = {self.aware_adapters.get(name) for name in names}
        factor = next(iter(self.lora_A.parameters()))
        return MergePlan(
            adapter_dtype=factor.dtype,
            caches=merged_caches,
            strategies=fitting_strategies(
                weight.spec,
                is_plain=is_plain,
                has_bias=any(self.lora_bias[name] for name in names),
                is_qalora=change is not None,
            ),
            base=base.to(device),
            adapters=tuple(names),
            weight=weight,
            before=before,
            target=stand_in.weight.data,
            bias=None if stand_in.bias is None else stand_in.bias.data,
            left=left,
            right=right,
            group_change=change,
            is_aware=bool(trained_aware) and prints == {fingerprint(weight)},
            trained_aware=trained_aware,
        )


def _is_transformed() -> bool:
    """Whether a compiler or a functorch transform is at work, which an autograd function would stop."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def dense_stand_in(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A float32 layer with copies of both, on the weight's device, for PEFT to merge adapters into."""
    stand_in = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    stand_in.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        stand_in.bias = nn.Parameter(bias.detach().to(weight.device, torch.float32, copy=True), requires_grad=False)
    return stand_in


def merge_report_of(plan: MergePlan, merged: QuantizedWeight | nn.Module) -> LayerMergeReport:
    own_branch = 0.0 if plan.base.branch is None else plan.base.branch.dense()
    if isinstance(merged, QuantizedWeight):
        after, bits = plan.base.method.dense(merged), merged.bits_per_weight
    elif isinstance(merged, QuantizedLinear):
        after, bits = merged.dense_weight(torch.float32) - own_branch, merged.bits_per_weight
    else:
        weight = cast(nn.Linear, merged).weight.data
        after = (weight.t() if plan.base.is_conv1d else weight).float() - own_branch
        bits = 8.0 * weight.dtype.itemsize
    return layer_report(
        plan.base.layer_name,
        list(plan.adapters),
        method=plan.weight.spec.method,
        before=plan.before,
        target=plan.target,
        merged=after,
        bits=(plan.weight.bits_per_weight, bits),
        strategies=plan.strategies,
        is_aware=plan.is_aware,
        can_be_qalora=can_be_qalora(plan.base),
    )


def set_merge_strategy(model: nn.Module, strategy: str) -> None:
    """Choose what PEFT's own ``merge_adapter`` and ``merge_and_unload`` do with the quantized layers of ``model``.

    Args:
        model: a PEFT model, or a transformers model with adapters. Layers that get an adapter later begin with
            ``"auto"``: call this again after ``add_adapter``.
        strategy: as for :func:`merge_back`; ``"auto"`` is the default.

    Raises:
        ValueError: an unknown strategy, or no layer of ours in the model; nothing was changed.
    """
    if strategy not in RULES:
        raise ValueError(
            f"strategy={strategy!r} is not supported here; choose one of {tuple(RULES)}. Calibrated merges need data: "
            'peft_quantlayers.merge_back(model, strategy="calibrated", calibration=..., unload=False), and '
            "merge_and_unload() after it."
        )
    layers = [module for module in model.modules() if isinstance(module, LoraQuantizedLinear)]
    if not layers:
        raise ValueError(
            "the model has no LoRA adapter on a quantized layer, and strategies are for those. PEFT's other tuners "
            'merge by requantizing; merge_back(strategy="dense") gives a float model.'
        )
    for layer in layers:
        layer.merge_strategy = strategy
