"""Add a delta to an HQQ weight on its own grid: codes move, scales and zeros stay.

``new = clamp(round(code + delta / scale + dither))``, where ``dither`` is fixed for each position and uniform in
(-1/2, 1/2). An adapter's delta is a small fraction of a step, so that without dither no code would move. With it the
fraction ``|delta| / scale`` of the codes moves by one step, which retains the delta on average and adds noise that
does not depend on it. A delta of zero moves no code.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..bitpack import pack, unpack
from ..dither import white_noise
from ..tiled import WeightTiles, buffered_tiles
from .reference import _grouped

# Rows after which the pattern repeats; one pattern is cached for each width and device.
DITHER_ROWS = 256
# Below 1/2 by more than the rounding of a float32 of size 255, so that a code with a delta of zero stays.
DITHER_RANGE = 0.5 - 2.0**-12


@lru_cache(maxsize=32)
def dither_pattern(in_features: int, device: torch.device) -> Tensor:
    """(DITHER_ROWS, in_features), float32, uniform in the range, white, and the same on every machine."""
    uniform = white_noise(DITHER_ROWS * in_features, device) - 0.5
    return (uniform * (2 * DITHER_RANGE)).view(DITHER_ROWS, in_features)


def _row_metadata(metadata: Tensor, rows: slice, axis: int) -> Tensor:
    """Scales or zeros of some rows, so that :func:`_grouped` reads them: a group of one row each for ``axis=0``."""
    if axis == 1:
        return metadata[rows]
    return metadata[torch.arange(rows.start, rows.stop, device=metadata.device) % metadata.shape[0]]


def update_rows(
    W_q: Tensor, scale: Tensor, delta: Tensor, *, nbits: int, axis: int, rows: slice, into: Tensor
) -> Tensor:
    """The new codes of the rows ``rows``, as floats, written to ``into`` (n, in_features).

    Args:
        W_q, nbits, axis: as for ``hqq_dequantize``.
        scale: float32, of the whole weight.
        delta: of these rows, (n, in_features), float32, weight units.
        rows: which rows.
        into: float32.
    """
    in_features = into.shape[1]
    into.copy_(unpack(W_q[rows], nbits, in_features))
    row_scale = _row_metadata(scale, rows, axis)
    if axis == 1:
        shape = (into.shape[0], scale.shape[1], -1)
        into.view(shape).addcdiv_(delta.view(shape), row_scale.unsqueeze(-1))
    else:
        into.addcdiv_(delta, row_scale)
    pattern = dither_pattern(in_features, into.device)
    first = rows.start
    while first < rows.stop:
        start = first % DITHER_ROWS
        last = min(rows.stop, first + DITHER_ROWS - start)
        into[first - rows.start : last - rows.start] += pattern[start : start + last - first]
        first = last
    return into.round_().clamp_(0, 2**nbits - 1)


def updated_tiles(
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    delta: Callable[[slice], Tensor],
    *,
    nbits: int,
    axis: int,
    in_features: int,
    dtype: torch.dtype,
) -> WeightTiles:
    """Row ranges of the updated weight with their dequantized tile; the tile's memory is reused by the next one.

    ``delta`` gives the delta of a range of rows, (n, in_features), float32.
    """
    scale, zero = scale.float(), zero.float()
    for rows, codes in _updated_codes(W_q, scale, delta, nbits=nbits, axis=axis, in_features=in_features):
        row_scale, row_zero = (_row_metadata(part, rows, axis) for part in (scale, zero))
        if axis == 1:
            groups, row_scale, row_zero = _grouped(codes, row_scale, row_zero, axis)
            groups.sub_(row_zero).mul_(row_scale)
        else:
            codes.sub_(row_zero).mul_(row_scale)
        yield rows, codes.to(dtype)


def updated_codes(
    W_q: Tensor, scale: Tensor, delta: Callable[[slice], Tensor], *, nbits: int, axis: int, in_features: int
) -> Tensor:
    """Packed codes of the updated weight, like ``W_q``; the codes that :func:`updated_tiles` dequantizes."""
    packed = torch.empty_like(W_q)
    for rows, codes in _updated_codes(W_q, scale.float(), delta, nbits=nbits, axis=axis, in_features=in_features):
        packed[rows] = pack(codes.to(torch.uint8), nbits)
    return packed


def _updated_codes(
    W_q: Tensor, scale: Tensor, delta: Callable[[slice], Tensor], *, nbits: int, axis: int, in_features: int
) -> WeightTiles:
    def updated(*, rows: slice, into: Tensor) -> Tensor:
        return update_rows(W_q, scale, delta(rows), nbits=nbits, axis=axis, rows=rows, into=into)

    return buffered_tiles(updated, W_q.shape[0], in_features, dtype=torch.float32, device=W_q.device)
