"""Where the weights of a model are: in this process, offloaded by accelerate, sharded over processes, or nowhere yet.

What reads weights one layer at a time asks here first, before it changes anything.
"""

from __future__ import annotations

from accelerate.utils import has_offloaded_params
from torch import nn

from .codes_parameter import is_sharded

# What brings offloaded weights back.
ONLOAD = "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
# The way out for what changes single layers of a sharded model.
IN_ONE_PROCESS = "Do it in one process, with the quantized folder loaded without distributed_config."


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps weights of ``model`` elsewhere, and fetches them for each forward pass."""
    return any(has_offloaded_params(module) for module in model.modules())


def check_weights_are_here(model: nn.Module, task: str, *, if_offloaded: str = "", if_sharded: str) -> None:
    """Raise ValueError, naming the first such parameter, unless this process has all weights of ``model``.

    Args:
        model: any module.
        task: what needs them, for the message; for example "merging".
        if_offloaded: another way out for an offloaded model, besides bringing its weights into memory.
        if_sharded: the way out for a sharded model.
    """
    for module_name, module in model.named_modules():
        for tensor_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{tensor_name}".lstrip(".")
            if is_sharded(parameter):
                raise ValueError(
                    f"{name} is sharded over processes, and {task} needs all of it. {if_sharded} The model was not "
                    "changed."
                )
            if parameter.is_meta and has_offloaded_params(module):  # not while accelerate has fetched them
                raise ValueError(
                    f"{name} is offloaded by accelerate, and {task} needs its numbers. Bring the weights into memory "
                    f"with {ONLOAD}, or load the model without offloading.{if_offloaded} The model was not changed."
                )
            if parameter.is_meta:
                raise ValueError(
                    f"{name} is on the meta device, without numbers, and {task} needs them. Load the weights "
                    f"first.{if_offloaded} The model was not changed."
                )
