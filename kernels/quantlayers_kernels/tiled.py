"""Products with a weight that comes in tiles: dequantize some rows, multiply, dequantize the next.

A tile stays in cache between being written and being read, and no dense weight is ever allocated: past
32 MiB such an allocation alone costs more than the product of a few hundred tokens, because the C library
maps fresh pages for it each time. Each method's ``tiles.py`` defines how a tile is dequantized.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from .precision import product_dtype

# CPU: 4 MiB of float32, in the last-level cache of any CPU of the last ten years, but at least as many rows as BLAS
# needs: of rows of 28672 numbers 4 MiB hold 36, and the product took 1.3 to 1.6 times as long with 36 as with 256.
CPU_TILE_ELEMENTS = 1 << 20
CPU_TILE_ROWS = 256
# With 292 rows instead of 288 some products took 2 to 8 % longer.
CPU_ROWS_MULTIPLE = 16
# GPU: 32 MiB in half precision stay in the level-2 cache of an H100, an A100 or a 4090 between being written and being
# read. Where they do not, a launch costs more than a smaller tile would save, and 128 MiB hold all but the largest
# layers. TODO: choose by measurement; waits for the sweep of benchmarks/bench_gpu.py.
CACHED_TILE_ELEMENTS = 1 << 24
DEVICE_TILE_ELEMENTS = 1 << 26
# 32 MiB of float32: the widest layers of models of 70B parameters.
MAX_KEPT_ELEMENTS = 1 << 23
# In fp16 and bf16 the rounding error grows with the square root of the number of accumulations; 4 of them keep it
# within twice that of a single GEMM.
MAX_HALF_SUMS = 4

# Row ranges with the rows' dense values, (n_rows, in_features); a tile's memory may be reused by the next.
WeightTiles = Iterator[tuple[slice, Tensor]]


def rows_per_tile(out_features: int, in_features: int, device: torch.device, *, multiple: int = 1) -> int:
    """How many rows of a weight make one tile on ``device``, a multiple of ``multiple``."""
    if device.type == "cpu":
        rows = max(CPU_TILE_ROWS, CPU_TILE_ELEMENTS // in_features // CPU_ROWS_MULTIPLE * CPU_ROWS_MULTIPLE)
    else:
        rows = device_tile_elements(device) // in_features
    return max(1, min(out_features, rows) // multiple) * multiple


@cache
def device_tile_elements(device: torch.device) -> int:
    """How many elements make one tile on a device other than the CPU."""
    holds_tile = device.type == "cuda" and torch.cuda.get_device_properties(device).L2_cache_size >= (
        2 * CACHED_TILE_ELEMENTS
    )
    return CACHED_TILE_ELEMENTS if holds_tile else DEVICE_TILE_ELEMENTS


def row_ranges(out_features: int, in_features: int, device: torch.device, *, multiple: int = 1) -> Iterator[slice]:
    """The ranges of rows that make the tiles of a weight; see :func:`rows_per_tile`."""
    return _ranges(out_features, rows_per_tile(out_features, in_features, device, multiple=multiple))


class _Spare(threading.local):
    """Unused CPU tiles of a thread, by dtype."""

    def __init__(self) -> None:
        self.tiles: dict[torch.dtype, list[Tensor]] = {}


_SPARE = _Spare()


@contextmanager
def scratch(n_rows: int, n_columns: int, *, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Uninitialised memory (n_rows, n_columns) for the length of the context.

    On a CPU a thread reuses its tiles for the next product: fresh memory is in no cache, and its pages are cleared
    first. On a GPU torch's allocator does the same.
    """
    n_elements = n_rows * n_columns
    if device.type != "cpu" or n_elements > MAX_KEPT_ELEMENTS:
        yield torch.empty(n_rows, n_columns, dtype=dtype, device=device)
        return
    spare = _SPARE.tiles.setdefault(dtype, [])
    tile = spare.pop() if spare else None
    if tile is None or tile.numel() < n_elements:
        with torch.inference_mode(False):  # an inference tensor cannot be written to outside of that mode
            tile = torch.empty(max(n_elements, CPU_TILE_ELEMENTS), dtype=dtype, device=device)
    try:
        yield tile[:n_elements].view(n_rows, n_columns)
    finally:
        spare.append(tile)


class DequantizeRows(Protocol):
    """Writes the dense values of some rows of a weight to memory (n_rows, in_features), and returns it."""

    def __call__(self, *, rows: slice, into: Tensor) -> Tensor: ...


def buffered_tiles(
    dequantize_rows: DequantizeRows,
    out_features: int,
    in_features: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    written: torch.dtype = torch.float32,
) -> WeightTiles:
    """All rows of a weight as ``dtype``, tile by tile, in one buffer.

    ``dequantize_rows`` writes ``written``; where ``dtype`` is another, there is a second buffer of it.
    """
    step = rows_per_tile(out_features, in_features, device)
    with (
        scratch(step, in_features, dtype=written, device=device) as buffer,
        nullcontext(buffer) if dtype == written else scratch(step, in_features, dtype=dtype, device=device) as cast,
    ):
        for rows in _ranges(out_features, step):
            n_rows = rows.stop - rows.start
            tile = dequantize_rows(rows=rows, into=buffer[:n_rows])
            yield rows, tile if dtype == written else cast[:n_rows].copy_(tile)


def linear(x: Tensor, tiles: WeightTiles, bias: Tensor | None, out_features: int, dtype: torch.dtype) -> Tensor:
    """``x @ weight.T + bias``: (..., in_features) to (..., out_features), with tiles of ``dtype``; dtype of ``x``."""
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    # The result must not be a view: callers add to it in place, which autograd forbids on a view.
    y = flat.new_empty(*x.shape[:-1], out_features)
    into = y.view(flat.shape[0], out_features)
    bias = None if bias is None else bias.to(dtype)
    for rows, tile in tiles:
        if bias is None:
            torch.mm(flat, tile.t(), out=into[:, rows])
        else:
            torch.addmm(bias[rows], flat, tile.t(), out=into[:, rows])
    return y.to(x.dtype)


def input_gradient(grad: Tensor, tiles: WeightTiles, in_features: int, dtype: torch.dtype) -> Tensor:
    """``grad @ weight``: (..., out_features) to (..., in_features), with tiles of ``dtype``; dtype of ``grad``."""
    flat = grad.reshape(-1, grad.shape[-1]).to(dtype)
    total = empty_input_gradient(flat, in_features, flat.shape[1])
    add_input_gradient(flat, tiles, total, is_first=True)
    return total.view(*grad.shape[:-1], in_features).to(grad.dtype)


def empty_input_gradient(grad: Tensor, in_features: int, out_features: int) -> Tensor:
    """Memory (n_tokens, in_features) for :func:`add_input_gradient` to sum over ``out_features``.

    Half-precision sums round once per tile: sums over more than ``MAX_HALF_SUMS`` tiles are in float32.
    """
    n_tiles = -(-out_features // rows_per_tile(out_features, in_features, grad.device))
    dtype = torch.promote_types(grad.dtype, torch.float32) if n_tiles > MAX_HALF_SUMS else grad.dtype
    return grad.new_empty(grad.shape[0], in_features, dtype=dtype)


def add_input_gradient(grad: Tensor, tiles: WeightTiles, into: Tensor, *, is_first: bool) -> None:
    """Add ``grad @ weight`` to ``into``, or write it there if ``is_first``: ``into`` is uninitialised then.

    Args:
        grad: (n_tokens, out_features), dtype of the tiles.
        tiles: of the weight.
        into: (n_tokens, in_features), of the same dtype or wider.
        is_first: whether ``into`` is uninitialised.
    """
    for rows, tile in tiles:
        is_empty = is_first and rows.start == 0
        if into.dtype != tile.dtype:
            product = grad[:, rows] @ tile
            into.copy_(product) if is_empty else into.add_(product)
        elif is_empty:
            torch.mm(grad[:, rows], tile, out=into)
        else:
            into.addmm_(grad[:, rows], tile)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """``grad.T @ x`` over all tokens: (..., out_features) and (..., in_features) to (out_features, in_features)."""
    dtype = product_dtype(grad.dtype, grad.device)
    return grad.reshape(-1, grad.shape[-1]).to(dtype).t() @ x.reshape(-1, x.shape[-1]).to(dtype)


def weight_gradient_tiles(grad: Tensor, x: Tensor, *, multiple: int = 1) -> WeightTiles:
    """Row ranges of :func:`weight_gradient` with their values, in one buffer that the next range reuses.

    Every range but the last has a multiple of ``multiple`` rows.
    """
    dtype = product_dtype(grad.dtype, grad.device)
    flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]).to(dtype), x.reshape(-1, x.shape[-1]).to(dtype)
    out_features, in_features = flat_grad.shape[1], flat_x.shape[1]
    step = rows_per_tile(out_features, in_features, grad.device, multiple=multiple)
    with scratch(min(step, out_features), in_features, dtype=dtype, device=grad.device) as buffer:
        for rows in _ranges(out_features, step):
            yield rows, torch.mm(flat_grad[:, rows].t(), flat_x, out=buffer[: rows.stop - rows.start])


def check_rows(n_rows: int, out_features: int) -> None:
    """Raise ValueError if a gradient does not have its weight's number of rows: kernels trust the shapes."""
    if n_rows != out_features:
        raise ValueError(f"the gradient is that of {n_rows} outputs, and the weight has {out_features}.")


def row_tiles(weight: Tensor, *, multiple: int = 1) -> WeightTiles:
    """Row ranges of a dense matrix, of the same sizes, with views of their values."""
    out_features, in_features = weight.shape
    step = rows_per_tile(out_features, in_features, weight.device, multiple=multiple)
    for rows in _ranges(out_features, step):
        yield rows, weight[rows]


def _ranges(n_rows: int, step: int) -> Iterator[slice]:
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of ``grad`` (..., out_features) over all tokens, in float32 or wider, given as ``dtype``."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=wide).to(dtype)
