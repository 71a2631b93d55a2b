"""HQQ on a CPU with the compiled kernels: products with few tokens, and dense rows. See ``csrc/hqq_kernels.h``."""

import torch
from torch import Tensor

from .. import native
from ..interface import DenseRows, HQQGradient, HQQWeight
from ..native_product import few_tokens_product
from ..precision import product_dtype
from ..prepared import PreparedProduct
from .layout import has_documented_layout

# The products by the bits that activations are rounded to.
KERNELS = {None: "ql_hqq_linear", 8: "ql_hqq_linear_int8"}
KERNELS_OF_SEVERAL = {None: "ql_hqq_linears", 8: "ql_hqq_linears_int8"}
# Above this, dequantized tiles and BLAS are as fast or faster: on one thread the break-even was between 8 and 32
# tokens with AVX2, and between 16 and more than 96 with AVX-512 (weights of 1536 x 576 and 4096 x 4096).
MAX_TOKENS = 16
# The same for activations rounded to 8 bits: on one thread a weight of 2048 x 2048 at 4 bits took 1.2 to 1.9 times as
# long exactly with 32 tokens, and 0.9 to 1.1 times with 128; one of 1536 x 576 at 3 bits 0.8 times with 32. Where half
# precision is multiplied faster the break-even is between 16 and 32, and in plain C between 1 and 4.
MAX_ROUNDED_TOKENS = 32


def can_dequantize(W_q: Tensor, scale: Tensor, zero: Tensor, *, nbits: int, axis: int, in_features: int) -> bool:
    """Whether the kernels read this weight: on a CPU, in the documented layout, with metadata of a known dtype.

    Tensors in another layout take the plain path, which raises; the kernels trust the shapes.
    """
    return (
        W_q.is_cpu
        and scale.is_cpu
        and zero.is_cpu
        and scale.dtype in native.KINDS
        and has_documented_layout(W_q, scale, zero, nbits=nbits, axis=axis, in_features=in_features)
        and native.is_available()
    )


def can_use_few_tokens(
    x: Tensor,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    *,
    nbits: int,
    axis: int,
    activation_bits: int | None = None,
) -> bool:
    """Whether :func:`linear_few_tokens` takes these arguments and is the faster way."""
    in_features = x.shape[-1]
    return (
        axis == 1
        and 0 < x.numel() <= _max_tokens(x.dtype, activation_bits) * in_features
        and x.is_cpu
        and x.dtype in native.KINDS
        and (bias is None or (bias.is_cpu and bias.shape == W_q.shape[:1]))
        and can_dequantize(W_q, scale, zero, nbits=nbits, axis=axis, in_features=in_features)
    )


def linear_few_tokens(
    x: Tensor,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    *,
    nbits: int,
    activation_bits: int | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` from packed codes with groups along the inputs; float32 inside, dtype of ``x`` out.

    ``activation_bits``: 8 for ``x`` rounded to 8 bits, as ``integer_reference.py`` defines it; None for ``x`` itself.
    """
    W_q, scale, zero = W_q.contiguous(), scale.contiguous(), zero.contiguous()
    weight = weight_of(W_q, scale, zero, nbits=nbits, axis=1, in_features=x.shape[-1])
    return few_tokens_product(KERNELS[activation_bits], weight, x, bias, out_features=W_q.shape[0])


def prepared(
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    nbits: int,
    axis: int,
    in_features: int,
    activation_bits: int | None = None,
) -> PreparedProduct | None:
    """:func:`linear_few_tokens` with this weight, its arguments checked now; None where the kernels do not read it."""
    if axis != 1 or not can_dequantize(W_q, scale, zero, nbits=nbits, axis=axis, in_features=in_features):
        return None
    if not (W_q.is_contiguous() and scale.is_contiguous() and zero.is_contiguous()):
        return None
    weight = weight_of(W_q, scale, zero, nbits=nbits, axis=axis, in_features=in_features)
    return PreparedProduct(
        KERNELS[activation_bits],
        weight,
        in_features=in_features,
        out_features=W_q.shape[0],
        max_tokens=min(MAX_TOKENS, _max_tokens(torch.float32, activation_bits)),
        together=KERNELS_OF_SEVERAL[activation_bits],
        layout=(nbits, scale.shape[1]),
    )


def _max_tokens(dtype: torch.dtype, activation_bits: int | None) -> int:
    """Up to how many tokens of ``dtype`` :func:`linear_few_tokens` is the faster way."""
    if activation_bits is None:
        return MAX_TOKENS
    if native.variant() == native.VARIANTS.index("baseline"):
        return 1
    return MAX_ROUNDED_TOKENS if product_dtype(dtype, torch.device("cpu")) == torch.float32 else MAX_TOKENS


def dequantize_rows(
    W_q: Tensor, scale: Tensor, zero: Tensor, *, nbits: int, axis: int, rows: slice, into: Tensor
) -> Tensor:
    """The rows ``rows`` of the weight, with the bits of the reference, written to ``into`` (n, in_features).

    ``into`` is contiguous and of one of ``native.WRITTEN``.
    """
    W_q, scale, zero = W_q.contiguous(), scale.contiguous(), zero.contiguous()
    written = DenseRows(
        out=into.data_ptr(), first_row=rows.start, n_rows=rows.stop - rows.start, kind=native.KINDS[into.dtype]
    )
    weight = weight_of(W_q, scale, zero, nbits=nbits, axis=axis, in_features=into.shape[1])
    native.call("ql_hqq_dequantize", weight, written)
    return into


def metadata_gradient_of_rows(
    gradient: Tensor,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    nbits: int,
    rows: slice,
    into: tuple[Tensor, Tensor],
) -> None:
    """Writes the gradients of scales and zeros (``axis=1``) from rows ``rows`` of the dense weight's ``gradient``.

    Args:
        gradient: (n, in_features), float32, contiguous.
        W_q, scale, zero, nbits: contiguous, as for :func:`.op.hqq_dequantize`.
        rows: the range of rows.
        into: gradients of ``scale`` and ``zero``, (out_features, n_groups), float32, contiguous.
    """
    of_rows = HQQGradient(
        weight=gradient.data_ptr(),
        scale=into[0].data_ptr(),
        zero=into[1].data_ptr(),
        first_row=rows.start,
        n_rows=len(gradient),
    )
    weight = weight_of(W_q, scale, zero, nbits=nbits, axis=1, in_features=gradient.shape[1])
    native.call("ql_hqq_gradient", weight, of_rows)


def weight_of(W_q: Tensor, scale: Tensor, zero: Tensor, *, nbits: int, axis: int, in_features: int) -> HQQWeight:
    """The kernels' view of contiguous tensors."""
    return HQQWeight(
        packed=W_q.data_ptr(),
        scale=scale.data_ptr(),
        zero=zero.data_ptr(),
        in_features=in_features,
        n_groups=scale.shape[1 if axis == 1 else 0],
        row_bytes=W_q.shape[1],
        nbits=nbits,
        axis=axis,
        kind=native.KINDS[scale.dtype],
    )
