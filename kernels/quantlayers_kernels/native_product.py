"""The product with few tokens by a compiled kernel, whatever the layout of the weight."""

import ctypes

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
    inputs = readable(x.resolve_neg())
    bias = None if bias is None else bias.float().contiguous()
    y, product = empty_product(inputs, bias, out_features)
    native.call(kernel, weight, product)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def readable(x: Tensor) -> Tensor:
    """``x`` as the products' kernels read it: contiguous, float32 or bfloat16."""
    return (x if x.dtype in native.WRITTEN else x.float()).contiguous()


def empty_product(inputs: Tensor, bias: Tensor | None, out_features: int) -> tuple[Tensor, Product]:
    """Memory for a product, (..., out_features), and the kernel's view of it and of what is multiplied.

    ``inputs`` (..., in_features), :func:`readable`, give its dtype; ``bias`` is float32 and contiguous. The caller
    keeps both alive.
    """
    y = inputs.new_empty((*inputs.shape[:-1], out_features))
    address_of_bias = None if bias is None else bias.data_ptr()
    n_tokens, kind = inputs.numel() // inputs.shape[-1], native.KINDS[inputs.dtype]
    return y, Product(y.data_ptr(), inputs.data_ptr(), address_of_bias, n_tokens, out_features, kind)
