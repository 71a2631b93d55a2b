"""Plans of merges that are made of tensors alone."""

from typing import Any

import torch
from torch import Tensor

from peft_quantlayers import LayerMergeReport, QuantSpec
from peft_quantlayers.merging import AdapterTraits, MergePlan
from peft_quantlayers.methods import get_method

SHAPE = (48, 64)


def plan_of(
    spec: QuantSpec, *, size: float = 0.05, factors: bool = True, delta: Tensor | None = None, **fields: Any
) -> MergePlan:
    """A random weight of ``spec`` and the delta of an adapter of rank 4.

    Args:
        spec: of the weight.
        size: norm of the delta over that of the weight.
        factors: whether the plan has the two factors of the delta.
        delta: in the place of the random one; has no factors.
        fields: of the plan, in the place of what is made here.
    """
    generator = torch.Generator().manual_seed(0)
    method = get_method(spec.method)
    weight = method.quantize(0.05 * torch.randn(SHAPE, generator=generator), spec)
    before = method.dequantize(weight)
    left, right = (torch.randn(shape, generator=generator) for shape in ((SHAPE[0], 4), (4, SHAPE[1])))
    left *= size * before.norm() / (left @ right).norm()
    has_factors = factors and delta is None
    made = {
        "layer_name": "first",
        "adapters": AdapterTraits(names=("default",)),
        "weight": weight,
        "before": before,
        "target": before + (left @ right if delta is None else delta),
        "left": left if has_factors else None,
        "right": right if has_factors else None,
    }
    return MergePlan(**made | fields)


def layer_report_of(strategy: str = "requantize", **fields: Any) -> LayerMergeReport:
    """The report on a layer of which a tenth of the delta is left."""
    made = {
        "name": "first", "adapters": ("default",), "method": "hqq", "strategy": strategy, "n_weights": 4,
        "bits_before": 4.5, "bits_after": 4.5, "weight_norm": 1.0, "delta_norm": 1.0, "error_norm": 1.0,
        "delta_retained": 0.1, "can_be_qalora": True, "strategies": ("aware", "keep", "calibrated"),
    }  # fmt: skip
    return LayerMergeReport(**made | fields)
