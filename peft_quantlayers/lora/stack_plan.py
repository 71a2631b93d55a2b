"""The merge plan of LoRA adapters on one expert of a stack: base and delta of that expert, dense in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from ..formats import QuantizedWeight
from ..layers.low_rank_branch import LowRankBranch
from ..layers.stack import QuantizedStack
from ..merging import AdapterTraits, MergePlan
from ..merging.strategies import LoraFacts, fitting_strategies
from ..methods import get_method


def expert_plan(layer: Any, expert: int, names: Sequence[str]) -> MergePlan:
    """The merge of the adapters ``names`` of a LoRA layer on a stack into one expert. Changes nothing.

    Raises:
        ValueError: the merged weight is not finite.
    """
    stack = cast(QuantizedStack, layer.unmerged_stack())
    device = next(layer.lora_A.parameters()).device
    weight = cast(QuantizedWeight, layer.unmerged_weight())[expert].to(device)
    before = get_method(weight.spec.method).dequantize(weight)
    lefts, rights = [], []
    for name in names:
        left, right = layer.expert_factors(name)
        lefts.append(left[expert].float() * layer.scaling[name])
        rights.append(right[expert].float())
    left, right = torch.cat(lefts, dim=1), torch.cat(rights)
    target = before + left @ right
    if not torch.isfinite(target).all():
        raise ValueError(
            f"the weight of expert {expert} with the adapters {list(names)} holds NaN or Inf. Nothing was merged. "
            "Train the adapter again or load another."
        )
    branch = None if stack.branch is None else LowRankBranch(stack.branch.A[expert], stack.branch.B[expert])
    return MergePlan(
        layer_name=f"{stack.layer_name}[{expert}]",
        adapters=expert_traits(layer, names),
        weight=weight,
        before=before,
        target=target,
        part=expert,
        left=left,
        right=right,
        compute_dtype=stack.compute_dtype,
        branch=branch,
    )


def expert_traits(layer: Any, names: Sequence[str]) -> AdapterTraits:
    """What is known of the adapters ``names`` of a LoRA layer on a stack without a plan."""
    return AdapterTraits(
        names=tuple(names),
        dtype=cast(nn.Linear, layer.lora_A[names[0]]).weight.dtype,
        strategies=fitting_strategies(LoraFacts(kind="expert", spec=layer.unmerged_stack().spec)),
    )
