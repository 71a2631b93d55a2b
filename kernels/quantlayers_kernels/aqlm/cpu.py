"""AQLM on a CPU with the compiled kernels: products with few tokens, and dense rows. See ``csrc/aqlm_kernels.h``.

Entries are read straight from the codebooks, an entry of eight inputs in one load, whatever the size of the codebook;
there is no table of the input's products with every entry.
"""

import torch
from torch import Tensor

from .. import native
from .layout import dense_shape, has_documented_layout

# Beyond, dequantized tiles and BLAS are as fast or faster: on one thread the two met between 8 and 32 tokens with
# AVX2, and between 16 and more than 96 with AVX-512 (weights of 1536 x 576 and 4096 x 4096).
MAX_TOKENS = 16


def can_dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor) -> bool:
    """Whether the kernels read this weight: on a CPU, in the documented layout, floats of a known dtype.

    What contradicts the layout is left to the plain path, which raises; the kernels trust the shapes.
    """
    return (
        codes.device.type == codebooks.device.type == scales.device.type == "cpu"
        and codebooks.dtype in native.KINDS
        and scales.dtype in native.KINDS
        and has_documented_layout(codes, codebooks, scales)
        and native.is_available()
    )


def can_use_few_tokens(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> bool:
    """Whether :func:`linear_few_tokens` takes these arguments and is the faster way."""
    n_tokens = x.shape[:-1].numel()
    return (
        0 < n_tokens <= MAX_TOKENS
        and x.device.type == "cpu"
        and x.dtype in native.KINDS
        and can_dequantize(codes, codebooks, scales)
        and x.shape[-1] == codes.shape[1] * codebooks.shape[3]
        and (bias is None or (bias.device.type == "cpu" and tuple(bias.shape) == (dense_shape(codes, codebooks)[0],)))
    )


def _readable(codes: Tensor, codebooks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weight's tensors as the kernels want them in memory; float32 codebooks where halves are slow to read."""
    if native.variant() == 0:
        codebooks = codebooks.float()
    return codes.contiguous(), codebooks.contiguous(), scales.contiguous()


def _shape_arguments(codes: Tensor, codebooks: Tensor, scales: Tensor) -> tuple[int, ...]:
    num_codebooks, size, out_group, in_group = codebooks.shape
    return (
        *(codes.shape[1], num_codebooks, size, out_group, in_group),
        *(codes.element_size(), native.KINDS[codebooks.dtype], native.KINDS[scales.dtype]),
    )


def linear_few_tokens(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` from AQLM codes; float32 inside, dtype of ``x`` out."""
    codes, codebooks, scales = _readable(codes, codebooks, scales)
    flat = x.reshape(-1, x.shape[-1]).float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    y = torch.empty(*x.shape[:-1], dense_shape(codes, codebooks)[0], dtype=torch.float32)
    native.call(
        "ql_aqlm_linear",
        *(y.data_ptr(), flat.data_ptr(), codes.data_ptr(), codebooks.data_ptr(), scales.data_ptr()),
        None if bias is None else bias.data_ptr(),
        *(flat.shape[0], y.shape[-1]),
        *_shape_arguments(codes, codebooks, scales),
    )
    return y.to(x.dtype)


def dequantize_rows(codes: Tensor, codebooks: Tensor, scales: Tensor, *, rows: slice, into: Tensor) -> Tensor:
    """The rows ``rows`` of the weight, written to ``into`` (n, in_features), float32 and contiguous."""
    codes, codebooks, scales = _readable(codes, codebooks, scales)
    native.call(
        "ql_aqlm_dequantize",
        *(into.data_ptr(), codes.data_ptr(), codebooks.data_ptr(), scales.data_ptr()),
        *(rows.start, rows.stop - rows.start),
        *_shape_arguments(codes, codebooks, scales),
    )
    return into
