"""Whether the tensors of an AQLM weight fit together: what the compiled kernels, which trust shapes, ask first."""

import torch
from torch import Tensor


def has_documented_layout(codes: Tensor, codebooks: Tensor, scales: Tensor) -> bool:
    """Whether shapes and the codes' dtype are those of ``reference.py``.

    Codebooks of a power of two entries only, so that a mask keeps every code inside.
    """
    size = codebooks.shape[1]
    return (
        codes.dtype in (torch.int8, torch.int16)
        and codes.dim() == 3
        and codebooks.dim() == 4
        and codes.shape[2] == codebooks.shape[0] > 0
        and codebooks.numel() > 0
        and size & (size - 1) == 0
        and size <= 1 << (8 * codes.element_size())
        and tuple(scales.shape) == (codes.shape[0], 1, 1, 1)
    )


def dense_shape(codes: Tensor, codebooks: Tensor) -> tuple[int, int]:
    """(out_features, in_features)."""
    return codes.shape[0] * codebooks.shape[2], codes.shape[1] * codebooks.shape[3]
