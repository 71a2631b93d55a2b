"""Private names of transformers that packages below this one need, each in one place. Imports torch only."""

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor


def mark_as_initialized(holder: Any) -> None:
    """Mark a module or tensor (or all of a class) as initialised for transformers.

    Its loader fills all that no checkpoint filled with random numbers, unless this is set.
    """
    holder._is_hf_initialized = True


def is_marked_as_initialized(holder: Any) -> bool:
    """Whether :func:`mark_as_initialized`, or transformers' loader, has marked it."""
    return getattr(holder, "_is_hf_initialized", False)


def name_or_path(model: Any) -> str:
    """The hub name or folder that a model was loaded from; empty where there is none."""
    return getattr(getattr(model, "config", None), "_name_or_path", "")


def remove_quantization_config(model: Any) -> None:
    """Take the quantizer and its config off every transformers model in ``model``, which is dense now."""
    for module in model.modules():
        if "hf_quantizer" in vars(module):  # the transformers model, which may lie inside a PEFT model
            module.hf_quantizer.remove_quantization_config(module)


def kept_dtype(model: Any, module_name: str, dtype: Any) -> str | None:
    """The dtype that the model's class keeps for the weight of a module where ``dtype`` is loaded; None for that one.

    For example T5 keeps the last linear layer of each block in float32 where the rest is float16.
    """
    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    for pattern, kept in plan.items():
        if re.search(pattern.replace("*", ".*"), f"{module_name}.weight"):
            return str(kept).removeprefix("torch.")
    return None


def frame_masks(model: Any, mask: Tensor) -> Iterator[Tensor]:
    """Which frames a model of recordings makes of samples that are no padding, as its parts compute it.

    ``mask``: (batch, samples) bool, with padding at the end. Yields (batch, frames) bool.
    """
    lengths = torch.cat([mask.sum(1), mask.new_tensor([mask.shape[1]], dtype=torch.long)])
    for module in model.modules():
        n_frames = getattr(module, "_get_feat_extract_output_lengths", None)
        if n_frames is None:
            continue
        # Some classes have it from another one, and cannot compute it; some take one length at a time.
        with suppress(AttributeError, NotImplementedError, TypeError):
            found = [n_frames(length) for length in lengths]
            for counts in zip(*(each if isinstance(each, tuple) else (each,) for each in found), strict=True):
                *of_rows, width = map(int, counts)
                yield torch.arange(width) < torch.tensor(of_rows)[:, None]
