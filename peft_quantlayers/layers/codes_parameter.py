"""The parameter that holds a layer's codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
    def around(cls, codes: nn.Parameter) -> CodesParameter:
        """``codes`` as a CodesParameter, with the attributes that were set on it."""
        wrapped = cls(codes)
        wrapped.__dict__.update(codes.__dict__)
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
