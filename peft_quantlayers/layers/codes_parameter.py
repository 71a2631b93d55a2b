"""The parameter that holds a layer's codes, in a dtype that process groups send."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

# The integer dtypes that both gloo and NCCL send. Codes of more than 8 bits are int16 in files, which neither does.
SENDABLE = (torch.int8, torch.uint8, torch.int32, torch.int64)


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, of which this process holds a part. (Importing that class takes a while.)"""
    return hasattr(tensor, "to_local")


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, in every process; all of them must call this."""
    whole: Tensor = cast(Any, tensor).full_tensor()
    return whole


def as_bytes(codes: Tensor) -> Tensor:
    """``codes`` as a module registers them: as they are or, in a dtype that cannot be sent, a view of their bytes.

    The last dimension of that view, uint8, is as many times larger as a code has bytes. A float tensor is left alone.
    """
    if codes.is_floating_point() or codes.dtype in SENDABLE:
        return codes
    return codes.contiguous().view(torch.uint8)


def as_codes(registered: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`as_bytes`, for codes of ``dtype``; a view. Sharded bytes are left as they are."""
    if registered.dtype != torch.uint8 or dtype in SENDABLE or is_sharded(registered):
        return registered
    return registered.view(dtype)


class CodesParameter(nn.Parameter):
    """The packed codes of a layer. ``numel()`` counts weights, not packed bytes.

    transformers' ``num_parameters`` and PEFT's trainable percentage add up ``numel()``; with packed bytes the model
    would appear half its size. ``nelement()``, ``shape`` and ``nbytes`` describe the memory.

    Attributes:
        n_weights: what ``numel()`` returns.
        layer_name: for messages.
    """

    n_weights: int
    layer_name: str

    def __new__(cls, codes: Tensor, requires_grad: bool = False) -> CodesParameter:
        return torch.Tensor._make_subclass(cls, codes.detach(), requires_grad)

    @classmethod
    def around(cls, parameter: nn.Parameter, codes: Tensor) -> CodesParameter:
        """A CodesParameter of ``codes`` in the place of ``parameter``, with the attributes that were set on that."""
        wrapped = cls(codes)
        wrapped.__dict__.update(parameter.__dict__)
        return wrapped

    def numel(self) -> int:
        return getattr(self, "n_weights", self.nelement())

    def requires_grad_(self, requires_grad: bool = True) -> CodesParameter:
        """Raises NotImplementedError for True: codes are integers, and integers take no gradient."""
        if requires_grad:
            raise NotImplementedError(
                f"{getattr(self, 'layer_name', 'layer')}: a quantized layer takes no gradient, so it can be neither "
                "unfrozen nor named in modules_to_save. Train an adapter on it, or keep it dense with skip_modules."
            )
        return self
