"""What a state dict brings for an adapter's own tensors: torch would cast integers and take NaN without a word."""

from collections.abc import Mapping

import torch
from torch import Tensor


def check_adapter_tensors(layer_name: str, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Raise ValueError, naming layer and tensor, unless all tensors of adapters are floating and finite.

    Args:
        layer_name: of the layer that holds the adapters.
        state_dict: as ``_load_from_state_dict`` gets it.
        prefix: of the layer's keys. Its ``base_layer`` is checked elsewhere.
    """
    for key, tensor in state_dict.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name.startswith("base_layer."):
            continue
        if not tensor.is_floating_point():
            damage = f"is of the dtype {tensor.dtype}, and adapters are floating"
        elif not tensor.is_meta and not torch.isfinite(tensor).all():
            damage = "holds NaN or Inf"
        else:
            continue
        raise ValueError(
            f"{layer_name}: the adapter's tensor {name} {damage}. Its file (adapter_model.safetensors) is damaged, or "
            "was saved after a training that diverged. Download it again, or take an earlier checkpoint."
        )
