"""Private names of transformers that packages below this one need, each in one place. Imports nothing."""

from typing import Any


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
