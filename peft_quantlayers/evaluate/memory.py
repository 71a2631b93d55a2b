"""Memory that a forward pass saves for the backward pass."""

import torch
from torch import Tensor, nn

from ..arguments import check_model


def saved_for_backward(module: nn.Module, x: Tensor) -> int:
    """Bytes that ``module(x)`` saves for its backward pass: each storage once, without the module's own tensors.

    Raises:
        TypeError: ``module`` is not a module, or ``x`` not a tensor.
    """
    check_model("saved_for_backward", module)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be the tensor that the module is called with, got {type(x).__name__}.")
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = module(x)  # noqa: F841  its graph must live until all is counted
    return sum(kept.values())
