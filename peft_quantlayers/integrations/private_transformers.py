"""Private names of transformers that packages below this one need, each in one place. Imports torch only."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def tied_weights(model: Any) -> dict[str, str]:
    """The parameter that each tied parameter is declared to share its numbers with, of all models in ``model``."""
    found: dict[str, str] = {}
    for prefix, module in model.named_modules():
        declared = getattr(module, "all_tied_weights_keys", None)
        for target, source in declared.items() if isinstance(declared, dict) else ():
            found[f"{prefix}.{target}".lstrip(".")] = f"{prefix}.{source}".lstrip(".")
    return found


@contextmanager
def tying_shared_tensors(model: Any) -> Iterator[None]:
    """After the body has replaced modules by quantized layers that share their tensors, have transformers tie those.

    What is declared of ``lm_head.weight`` is declared of ``lm_head.W_q`` and so on from then on, so that transformers
    saves one copy, ties them again after loading, and keeps them on one device. :func:`tie_dense_weights` undoes it.
    """
    owners = [each for each in model.modules() if isinstance(getattr(each, "_tied_weights_keys", None), dict)]
    # Now, since patterns are expanded to the names that there are.
    declared = [owner.get_expanded_tied_weights_keys(all_submodels=False) for owner in owners]
    yield
    for owner, names in zip(owners, declared, strict=True):
        _declare(owner, "_tied_weights_keys", names)
    for owner in model.modules():
        if isinstance(getattr(owner, "all_tied_weights_keys", None), dict):
            _declare(owner, "all_tied_weights_keys", owner.all_tied_weights_keys)


# Attribute of a model, while its embeddings are quantized: its own declarations of before.
_DENSE_TIES = "_ties_of_dense_weights"


def _declare(owner: Any, attribute: str, names: dict[str, str]) -> None:
    if (renamed := _of_shared_tensors(owner, names)) != names:
        before = vars(owner).setdefault(_DENSE_TIES, {})
        before.setdefault(attribute, vars(owner).get(attribute))
        setattr(owner, attribute, renamed)


def tie_dense_weights(model: Any) -> None:
    """Undo :func:`tying_shared_tensors`, in a model that is dense now: declare what was declared before."""
    for owner in model.modules():
        for attribute, names in vars(owner).pop(_DENSE_TIES, {}).items():
            if names is None:
                delattr(owner, attribute)  # the class has it
            else:
                setattr(owner, attribute, names)


def _of_shared_tensors(owner: Any, declared: dict[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    modules = dict(owner.named_modules())
    for target, source in declared.items():
        names = {target: source}
        if target.endswith(".weight"):
            layer, other = (modules.get(name.rpartition(".")[0]) for name in (target, source))
            if layer is not None and layer in getattr(other, "sharing", ()):
                prefixes = target.removesuffix("weight"), source.removesuffix("weight")
                tensors = [name for name, parameter in layer.named_parameters() if name != "bias"]
                names = {prefixes[0] + name: prefixes[1] + name for name in tensors}
        found |= names
    return found


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
