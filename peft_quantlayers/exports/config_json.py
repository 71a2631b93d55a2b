"""The one place for what engines expect in ``config.json`` and transformers 5 writes otherwise."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# Rope parameters that older readers know under a name of their own at the top level.
_ROPE_OF_LAYERS = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
# Configs inside a config: of vision-language models.
_PARTS = ("text_config",)


def engine_config(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """``config``, a parsed config.json of transformers 5, with what readers of the older form look for beside it.

    transformers 5 keeps the base of the rotary embedding in ``rope_parameters`` alone. mlx-lm takes 10000 where it
    finds no ``rope_theta``, without a word. What was there stays: transformers reads the result as before.
    """
    written = copy.deepcopy(dict(config))
    name = str(dtype).removeprefix("torch.")
    written["dtype"] = written["torch_dtype"] = name
    if "n_positions" in written:
        written.setdefault("n_ctx", written["n_positions"])
    for part in (written, *(written[key] for key in _PARTS if isinstance(written.get(key), dict))):
        part["dtype"] = name
        _add_rope_keys(part)
        if "num_local_experts" in part:  # Qwen3-MoE's readers know the other name
            part.setdefault("num_experts", part["num_local_experts"])
    return written


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``config`` as config.json."""
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _add_rope_keys(config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return
    if any(isinstance(value, Mapping) for value in rope.values()):  # one entry for each kind of layer
        for kind, key in _ROPE_OF_LAYERS.items():
            theta = (rope.get(kind) or {}).get("rope_theta")
            if theta is not None:
                config.setdefault(key, theta)
        config.setdefault("rope_scaling", _scaling(rope.get("full_attention") or {}))
        _add_sliding_pattern(config)
        return
    if rope.get("rope_theta") is not None:
        config.setdefault("rope_theta", rope["rope_theta"])
    if "partial_rotary_factor" in rope:
        config.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    config.setdefault("rope_scaling", _scaling(rope))


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """What older configs call ``rope_scaling``: None where the positions are not scaled."""
    if rope.get("rope_type", "default") == "default":
        return None
    return {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}


def _add_sliding_pattern(config: dict[str, Any]) -> None:
    """Every how many layers one attends to all positions (Gemma 2 and 3), where the layers are listed one by one."""
    kinds = config.get("layer_types") or []
    if "full_attention" in kinds and "sliding_attention" in kinds:
        config.setdefault("sliding_window_pattern", kinds.index("full_attention") + 1)
