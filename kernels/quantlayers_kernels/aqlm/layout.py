"""Whether the tensors of an AQLM weight fit together: the compiled kernels trust shapes, so this is asked first."""

from functools import lru_cache

import torch
from torch import Tensor


def has_documented_layout(codes: Tensor, codebooks: Tensor, scales: Tensor) -> bool:
    """Whether shapes and the codes' dtype are those of ``reference.py``.

    Codebooks of a power of two entries only, so that a mask keeps every code inside.
    """
    return codes.dtype in (torch.int8, torch.int16) and _fit_together(
        codes.shape, codebooks.shape, scales.shape, codes.element_size()
    )


@lru_cache(maxsize=4096)
def _fit_together(
    codes: tuple[int, ...], codebooks: tuple[int, ...], scales: tuple[int, ...], code_bytes: int
) -> bool:
    if len(codes) != 3 or len(codebooks) != 4 or 0 in codebooks:
        return False
    size = codebooks[1]
    return (
        codes[2] == codebooks[0]
        and size & (size - 1) == 0
        and size <= 1 << (8 * code_bytes)
        and scales == (codes[0], 1, 1, 1)
    )


def dense_shape(codes: Tensor, codebooks: Tensor) -> tuple[int, int]:
    """(out_features, in_features)."""
    out_groups, in_groups, _ = codes.shape
    _, _, out_group, in_group = codebooks.shape
    return out_groups * out_group, in_groups * in_group
