"""Whether the tensors of an HQQ weight fit together: what the compiled kernels, which trust shapes, ask first."""

from torch import Tensor, uint8

from ..bitpack import packed_row_bytes


def has_documented_layout(
    W_q: Tensor, scale: Tensor, zero: Tensor, *, nbits: int, axis: int, in_features: int
) -> bool:
    """Whether shapes and dtypes are those of ``reference.py``, with one dtype for ``scale`` and ``zero``."""
    out_features = W_q.shape[0]
    if axis == 1:
        n_groups, n_per_axis, metadata_shape = scale.shape[-1], in_features, (out_features, scale.shape[-1])
    else:
        n_groups, n_per_axis, metadata_shape = scale.shape[0], out_features, (scale.shape[0], in_features)
    return (
        W_q.dtype == uint8
        and scale.dtype == zero.dtype
        and tuple(scale.shape) == tuple(zero.shape) == metadata_shape
        and n_groups > 0
        and n_per_axis % n_groups == 0
        and tuple(W_q.shape) == (out_features, packed_row_bytes(in_features, nbits))
    )
