"""Private names of transformers that rooms below this one need, each said once. Imports nothing."""

from typing import Any


def mark_as_initialized(holder: Any) -> None:
    """Tell transformers that a module or tensor (or all of a class) holds values already.

    Its loader fills what no checkpoint filled with random numbers, unless this is set.
    """
    holder._is_hf_initialized = True


def is_marked_as_initialized(holder: Any) -> bool:
    """Whether :func:`mark_as_initialized`, or transformers' loader, has said so."""
    return getattr(holder, "_is_hf_initialized", False)


def name_or_path(model: Any) -> str:
    """The hub name or folder that a model was loaded from; empty where there is none."""
    return getattr(getattr(model, "config", None), "_name_or_path", "")
