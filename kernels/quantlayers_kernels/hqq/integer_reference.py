"""The product of an HQQ weight with activations rounded to 8 bits, in float64: what the integer kernels must match.

Each group of columns is cut into blocks of ``BLOCK`` columns, the last of which may be shorter. A block of a token's
activations is rounded to ``scale * code`` with whole codes from -127 to 127. The sums of products with the weight's
codes are then whole numbers, without any rounding; only scales are floats:

    y = sum over blocks of  weight_scale * scale * (sum of weight_code * code - weight_zero * sum of code)
"""

import torch
from torch import Tensor

from ..bitpack import unpack

BLOCK = 16
# Blocks of smaller activations are rounded to 0: 127 over the largest of them might overflow.
SMALLEST = 2.0**-100


def rounded_activations(x: Tensor, n_groups: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``x``.

    Args:
        x: (n_tokens, in_features), float32.
        n_groups: groups of columns of the weight.
        block: columns of a block; the kernels have no other.

    Returns:
        codes (n_tokens, n_groups, n_blocks, block) int8, with zeros beyond the last column of a group, and scales
        (n_tokens, n_groups, n_blocks, 1) float32. The scale of a block with NaN or Inf is NaN.
    """
    groups = x.reshape(len(x), n_groups, -1)
    size = groups.shape[-1]
    blocks = torch.nn.functional.pad(groups, (0, -size % block)).unflatten(-1, (-1, block))
    is_finite = blocks.isfinite().all(-1, keepdim=True)
    largest = blocks.abs().amax(-1, keepdim=True)
    is_rounded = is_finite & (largest > SMALLEST)
    per_unit = torch.full_like(largest, 127) / largest  # 127 / largest would be 127 times a rounded reciprocal
    codes = torch.where(is_rounded, (blocks * per_unit).round(), 0).to(torch.int8)
    return codes, torch.where(is_finite, torch.where(is_rounded, largest / 127, 0), torch.nan)


def integer_linear_reference(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, *, nbits: int
) -> Tensor:
    """``x @ weight.T + bias``, (n_tokens, out_features), float64, for groups of ``axis=1``."""
    n_tokens, n_groups = len(x), scale.shape[1]
    codes, of_x = rounded_activations(x.float(), n_groups)
    weights = unpack(W_q, nbits, x.shape[1]).view(len(W_q), n_groups, -1)
    weights = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % BLOCK)).view(len(W_q), *codes.shape[1:])
    sums = torch.einsum("tgbk,ogbk->togb", codes.double(), weights.double())
    sums = sums - zero.double()[None, :, :, None] * codes.double().sum(-1)[:, None]
    y = (sums * of_x.double().view(n_tokens, 1, n_groups, -1) * scale.double()[None, :, :, None]).sum((2, 3))
    return y if bias is None else y + bias.double()
