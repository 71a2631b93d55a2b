"""A dense float32 layer in the place of a quantized one, into which PEFT merges adapters by its own rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..merging import AdapterTraits, MergePlan, MergeSource


@contextmanager
def dense_stand_in_under(adapter_layer: Any, weight: Tensor, bias: Tensor | None) -> Iterator[nn.Linear]:
    """Within the context a dense layer is under the adapters of a layer of PEFT's, with nothing merged.

    Args:
        adapter_layer: PEFT's layer; its base and its list of merged adapters are restored at the end.
        weight: (out_features, in_features), float32.
        bias: (out_features,) or None; both are copied to the device of ``weight``.
    """
    stand_in = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    stand_in.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        stand_in.bias = nn.Parameter(bias.detach().to(weight.device, torch.float32, copy=True), requires_grad=False)
    base, merged = adapter_layer.base_layer, list(adapter_layer.merged_adapters)
    adapter_layer.base_layer = stand_in
    adapter_layer.merged_adapters.clear()
    try:
        yield stand_in
    finally:
        adapter_layer.base_layer = base
        adapter_layer.merged_adapters[:] = merged


def plan_by_peft(source: MergeSource, layer: Any, merge: Callable[..., None], names: Sequence[str]) -> MergePlan:
    """The merge of adapters of any kind into a quantized layer, of which only the merged weight is known.

    Args:
        source: of the plan.
        layer: PEFT's layer with the adapters.
        merge: PEFT's own merge of ``layer``.
        names: of the adapters.

    Raises:
        ValueError: the merged weight is not finite.
    """
    base, unmerged, weight = source.quantized_base(), source.unmerged_snapshot(), source.unmerged_weight()
    before = base.method.dequantize(weight)
    with torch.no_grad(), dense_stand_in_under(layer, before, unmerged.tensors.get("bias")) as stand_in:
        try:
            merge(safe_merge=True, adapter_names=list(names))
        except ValueError as error:
            raise ValueError(f"{error}. The model is left as it was.") from None
        adapters = tuple(layer.merged_adapters)
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
