"""The product with few tokens by a compiled kernel, whatever the layout of the weight."""

import ctypes

import torch
from torch import Tensor

from . import native
from .interface import Product


def few_tokens_product(
    kernel: str, weight: ctypes.Structure, x: Tensor, bias: Tensor | None, *, out_features: int
) -> Tensor:
    """``x @ weight.T + bias``, (..., out_features) on the CPU; float32 inside, dtype of ``x`` out.

    Args:
        kernel: one of ``interface.KERNELS`` that takes a weight and a :class:`Product`.
        weight: the addresses of its tensors, which the caller keeps alive.
    """
    inputs = x.resolve_neg().float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    y = torch.empty((*x.shape[:-1], out_features), dtype=torch.float32, device="cpu")
    product = Product(
        y=y.data_ptr(),
        x=inputs.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        tokens=inputs.numel() // x.shape[-1],
        out_features=out_features,
    )
    native.call(kernel, weight, product)
    return y if x.dtype == torch.float32 else y.to(x.dtype)
