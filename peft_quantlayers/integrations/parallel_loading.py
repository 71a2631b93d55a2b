"""Which ways of loading a model in parallel processes work with quantized layers; the others are refused by name."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

ROAD = (
    "Quantize and save the model in one process (quantize_model or from_pretrained without distributed_config, then "
    "save_model), and load that folder with distributed_config=DistributedConfig(fsdp_size=...)."
)
SPLITS = {
    "tp_size": "tensor parallelism",
    "pp_size": "pipeline parallelism",
    "ep_size": "expert parallelism",
    "fsdp_size": "FSDP",
    "dp_replicate_size": "HSDP",
}
# What shards tensors by rows and gathers them for each product, which any tensor of a layer stands.
ROW_WISE = ("fsdp_size", "dp_replicate_size")


def refuse_parallel_loading(config: Any, *, is_quantizing: bool) -> None:
    """Raise ValueError if a model is loaded in a split that its quantized layers do not survive.

    Args:
        config: the model's; transformers has put ``distributed_config`` there.
        is_quantizing: whether the weights are quantized while they are read.
    """
    wanted = getattr(config, "distributed_config", None)
    sizes = wanted if isinstance(wanted, dict) else vars(wanted) if wanted is not None else {}
    used = [name for name in SPLITS if (sizes.get(name) or 1) > 1]
    if is_quantizing and used:
        raise ValueError(
            f"{_said(used, sizes)} while quantizing is not supported: a process reads parts of weights, and needs "
            f"whole ones. {ROAD}"
        )
    refused = [name for name in used if name not in ROW_WISE]
    if refused:
        raise ValueError(
            f"{_said(refused, sizes)} is not supported for quantized layers. Load the folder with "
            "distributed_config=DistributedConfig(fsdp_size=...), which shards by rows, or with device_map."
        )


def check_finite_shards(name: str, layer: nn.Module) -> None:
    """Raise ValueError if this process's part of a sharded layer's floating tensors holds NaN or Inf."""
    for tensor_name, parameter in layer.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(cast(Any, parameter).to_local()).all():
            raise ValueError(f"{name}.{tensor_name} holds NaN or Inf: the checkpoint is damaged.")


def _said(names: list[str], sizes: dict[str, Any]) -> str:
    return " and ".join(f"{SPLITS[name]} ({name}={sizes[name]})" for name in names)
