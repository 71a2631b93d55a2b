"""Whether the tensors of an HQQ weight fit together: the compiled kernels trust shapes, so this is asked first."""

from functools import lru_cache

from torch import Tensor, uint8

from ..bitpack import packed_row_bytes


def has_documented_layout(
    W_q: Tensor, scale: Tensor, zero: Tensor, *, nbits: int, axis: int, in_features: int
) -> bool:
    """Whether shapes and dtypes are those of ``reference.py``, with one dtype for ``scale`` and ``zero``."""
    return (
        W_q.dtype == uint8
        and scale.dtype == zero.dtype
        and _fit_together(W_q.shape, scale.shape, zero.shape, nbits, axis, in_features)
    )


@lru_cache(maxsize=4096)
def _fit_together(
    packed: tuple[int, ...], scale: tuple[int, ...], zero: tuple[int, ...], nbits: int, axis: int, in_features: int
) -> bool:
    if len(packed) != 2 or len(scale) != 2 or zero != scale:
        return False
    out_features, n_groups = packed[0], scale[1 if axis == 1 else 0]
    metadata, n_per_axis = (
        ((out_features, n_groups), in_features) if axis == 1 else ((n_groups, in_features), out_features)
    )
    return (
        scale == metadata
        and n_groups > 0
        and n_per_axis % n_groups == 0
        and packed[1] == packed_row_bytes(in_features, nbits)
    )
