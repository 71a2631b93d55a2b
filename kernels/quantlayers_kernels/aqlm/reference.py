"""What an AQLM weight means, one codebook after the other. Every fast path must match this file.

``W[o * og + a, i * ig + b] = scales[o] * sum_m codebooks[m, codes[o, i, m], a, b]``: the published format of
Egiazarian et al. 2024, "Extreme Compression of Large Language Models via Additive Quantization". Codes are
stored as signed integers of 8 or 16 bits: a code of ``2**(bits - 1)`` or more wraps around to a negative number.
"""

import torch
from torch import Tensor


def unsigned_codes(codes: Tensor, nbits_per_codebook: int) -> Tensor:
    """Indices into the codebooks, int64, of stored codes; always below ``2**nbits_per_codebook``."""
    return codes.long() % 2**nbits_per_codebook


def wrapped_codes(codes: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """``codes`` (integers below ``size``) as they are stored: the upper half wraps around to negative numbers."""
    return torch.where(codes >= size // 2, codes - size, codes).to(dtype) if size > 2 else codes.to(dtype)


def dequantize_aqlm_reference(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """(out_features, in_features), float32.

    Args:
        codes: (out_features / og, in_features / ig, num_codebooks), int8 or int16.
        codebooks: (num_codebooks, 2**nbits_per_codebook, og, ig), floating.
        scales: (out_features / og, 1, 1, 1), floating.
    """
    num_codebooks, size, out_group, in_group = codebooks.shape
    index = unsigned_codes(codes, size.bit_length() - 1)
    total = torch.zeros(*codes.shape[:2], out_group, in_group, dtype=torch.float32, device=codes.device)
    for m in range(num_codebooks):
        total += codebooks[m].float()[index[:, :, m]]
    return (total * scales.float()).permute(0, 2, 1, 3).reshape(codes.shape[0] * out_group, -1)


def aqlm_linear_reference(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` in float32, given back in the dtype of ``x`` (..., in_features)."""
    weight = dequantize_aqlm_reference(codes, codebooks, scales)
    y = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    return y.to(x.dtype)
