"""The merge plan of LoRA adapters: PEFT merges them into a dense float32 stand-in for the quantized layer.

So every variant (DoRA, ...) and ``lora_bias`` follow PEFT's own rules. May import PEFT's public classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from ..formats import QuantizedWeight
from ..integrations.private_peft import set_variant_caches, variant_caches
from ..layers import QuantizedLinear
from ..merging import AdapterTraits, MergePlan
from ..merging.strategies import LoraFacts, fitting_strategies
from ..methods import get_method
from .dense_stand_in import dense_stand_in_under
from .merge_aware_config import fingerprint
from .qalora import MergeableQALoraVariant, can_be_qalora, group_delta


def lora_plan(
    layer: Any, names: Sequence[str], *, merge: Callable[..., None], merge_aware: dict[str, str]
) -> MergePlan:
    """The merge of the adapters ``names`` of a LoRA layer, in place of what is merged. Changes nothing.

    Args:
        layer: PEFT's LoRA layer, and a :class:`MergeSource`.
        names: in the order in which they are summed.
        merge: PEFT's own merge of ``layer``.
        merge_aware: fingerprint of the quantized weight that a merge-aware adapter is rounded against, by adapter.

    Raises:
        ValueError: the merged weight is not finite.
    """
    base, unmerged = layer.quantized_base(), layer.unmerged_snapshot()
    device = next(layer.get_base_layer().parameters()).device
    weight = cast(QuantizedWeight, unmerged.weight).to(device)
    before = get_method(weight.spec.method).dequantize(weight)
    bias = unmerged.tensors.get("bias")
    with dense_stand_in_under(layer, before, bias) as stand_in, _variant_caches(layer, unmerged.host_state):
        try:
            merge(safe_merge=True, adapter_names=list(names))
        except ValueError as error:
            raise ValueError(f"{error}. Nothing was merged. Train the adapter again or load another.") from None
        merged_caches = variant_caches(layer)
    adapters = lora_traits(layer, names, weight, merge_aware=merge_aware)
    left, right = lora_factors(layer, names) if _are_plain(layer, names) else (None, None)
    return MergePlan(
        layer_name=base.layer_name,
        adapters=adapters,
        weight=weight,
        before=before,
        target=stand_in.weight.data,
        tensors={} if stand_in.bias is None else {"bias": stand_in.bias.data},
        left=left,
        right=right,
        group_delta=_sum_of_group_deltas(layer, base, names),
        compute_dtype=base.compute_dtype,
        branch=base.branch,
        host_state=merged_caches,
    )


def lora_traits(
    layer: Any, names: Sequence[str], weight: QuantizedWeight, *, merge_aware: dict[str, str]
) -> AdapterTraits:
    """What is known of the adapters ``names`` of a LoRA layer on the unmerged ``weight`` without a plan.

    Other arguments as of :func:`lora_plan`.
    """
    is_qalora = bool(names) and all(isinstance(layer.lora_variant.get(name), MergeableQALoraVariant) for name in names)
    facts = LoraFacts(
        spec=weight.spec,
        is_plain=_are_plain(layer, names),
        has_bias=any(layer.lora_bias[name] for name in names),
        is_qalora=is_qalora,
    )
    return AdapterTraits(
        names=tuple(names),
        dtype=next(iter(layer.lora_A.parameters())).dtype,
        strategies=fitting_strategies(facts),
        is_merge_aware=_is_rounded_against(weight, [merge_aware.get(name) for name in names]),
        trained_merge_aware=tuple(name for name in names if name in merge_aware),
        can_be_qalora=can_be_qalora(layer.quantized_base()),
    )


def _are_plain(layer: Any, names: Sequence[str]) -> bool:
    """Whether the delta of these adapters is a product of two factors."""
    return bool(names) and not any(name in layer.lora_variant for name in names)


def lora_factors(layer: LoraLinear, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(out_features, r) and (r, in_features), float32, whose product is the sum of the deltas of plain LoRA."""
    left = [cast(nn.Linear, layer.lora_B[name]).weight.float() * layer.scaling[name] for name in names]
    right = [cast(nn.Linear, layer.lora_A[name]).weight.float() for name in names]
    return torch.cat(left, dim=1), torch.cat(right)


@contextmanager
def _variant_caches(layer: Any, caches: dict[str, Any]) -> Iterator[None]:
    """Within the context the caches of LoRA variants are ``caches``; in the end what they were."""
    before = variant_caches(layer)
    set_variant_caches(layer, caches)
    try:
        yield
    finally:
        set_variant_caches(layer, before)


def _is_rounded_against(weight: QuantizedWeight, prints: list[str | None]) -> bool:
    """Whether all fingerprints (at least one is there) are those of ``weight``."""
    known = {each for each in prints if each is not None}
    return bool(known) and len(set(prints)) == 1 and known == {fingerprint(weight)}


def _sum_of_group_deltas(layer: Any, base: QuantizedLinear, names: Sequence[str]) -> Tensor | None:
    """Sum of the deltas of each quantization group, (out_features, n_groups); None if not all adapters are QA-LoRA."""
    is_qalora = [isinstance(layer.lora_variant.get(name), MergeableQALoraVariant) for name in names]
    if not any(is_qalora):
        return None
    group_size = base.method.group_delta_size(base.spec, in_features=base.in_features)
    if not all(is_qalora):
        return None
    n_groups = base.in_features // group_size
    deltas = [group_delta(layer, name) for name in names]
    return torch.stack([each.repeat_interleave(n_groups // each.shape[1], dim=1) for each in deltas]).sum(0)
