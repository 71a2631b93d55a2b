"""HQQ on a GPU with Triton: products with few tokens, and dense rows. See ``triton_kernels.py``."""

from functools import cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from .. import gpu, gpu_tuning
from ..bitpack import packed_row_bytes
from ..bitpack.reference import PLANES
from .layout import has_documented_layout

# Weights that a program decodes into memory at a time; bytes that a thread reads at once.
DENSE_TILE, VECTOR = 8192, 16
# Rows of a program: with more rows x is read less often.
MIN_ROWS, MAX_ROWS = 4, 32
# On the tensor cores: bytes of a row in a step, by the codes' slots in a byte.
DOT_BYTES = {1: 64, 2: 64, 4: 64, 8: 32}


class TokenForm(NamedTuple):
    """Of the product with one token: weights that a program decodes at a time, and its warps."""

    weights: int
    warps: int


class DotForm(NamedTuple):
    """Of the product on tensor cores: rows of a program, its warps, and steps in flight."""

    rows: int
    warps: int
    stages: int


TOKEN_FORMS = (TokenForm(16384, 4), TokenForm(8192, 4), TokenForm(4096, 2), TokenForm(16384, 8), TokenForm(32768, 8))


def dot_forms(n_tokens: int) -> tuple[DotForm, ...]:
    """Forms for so many tokens, at most ``gpu.MAX_DOT_TOKENS`` of them in a tile."""
    warps = gpu.dot_warps(n_tokens)
    if gpu.has_little_shared_memory():
        return (DotForm(32, warps, 2), DotForm(16, warps, 2), DotForm(64, 8, 2), DotForm(32, warps, 3))
    others = ((16, warps, 3), (64, 8, 3), (32, warps, 2), (32, warps, 4))
    return (DotForm(32, warps, 3), *(DotForm(*each) for each in others))


def _n_slots(nbits: int) -> int:
    """Codes in a byte of the finest plane."""
    return 8 // PLANES[nbits][-1]


def _segment(nbits: int, in_features: int) -> int:
    """Bytes of a row of the finest plane, and the distance in inputs of the codes in one of them."""
    return -(-in_features // _n_slots(nbits))


def can_dequantize(W_q: Tensor, scale: Tensor, zero: Tensor, *, nbits: int, axis: int, in_features: int) -> bool:
    """Whether the kernels read this weight: on a GPU, in the documented layout, with groups along the inputs.

    Tensors in another layout take the plain path, which raises. Of two planes, a row of one must be a multiple
    of a row of the other, as it is wherever eight divides ``in_features``.
    """
    n_segments = sum(PLANES.get(nbits, (0,))) // PLANES.get(nbits, (1,))[-1]
    return (
        axis == 1
        and gpu.can_hold(W_q, scale, zero)
        and scale.is_floating_point()
        and has_documented_layout(W_q, scale, zero, nbits=nbits, axis=axis, in_features=in_features)
        and packed_row_bytes(in_features, nbits) == n_segments * _segment(nbits, in_features)
    )


def can_use_few_tokens(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, *, nbits: int, axis: int
) -> bool:
    """Whether :func:`linear_few_tokens` takes these arguments and is the faster way."""
    n_tokens, in_features = x.shape[:-1].numel(), x.shape[-1]
    return (
        0 < n_tokens <= gpu.MAX_TOKENS
        and gpu.can_hold(x, W_q, *([] if bias is None else [bias]))
        and (bias is None or tuple(bias.shape) == (W_q.shape[0],))
        and can_dequantize(W_q, scale, zero, nbits=nbits, axis=axis, in_features=in_features)
        and (n_tokens == 1 or gpu.has_tensor_cores(x))
        and (n_tokens == 1 or _fits_tensor_cores(nbits, in_features, in_features // scale.shape[1]))
    )


def _dot_bytes(nbits: int, in_features: int, group_size: int) -> int:
    """Bytes of a row in a step, a power of two: their codes of one slot lie in one group."""
    return gcd(DOT_BYTES[_n_slots(nbits)], group_size, _segment(nbits, in_features))


def _fits_tensor_cores(nbits: int, in_features: int, group_size: int) -> bool:
    return in_features % _n_slots(nbits) == 0 and _dot_bytes(nbits, in_features, group_size) >= gpu.MIN_DOT


@cache
def _planes(nbits: int) -> dict[str, int]:
    """How the kernels read codes of ``nbits`` bits."""
    coarse, fine = PLANES[nbits] if len(PLANES[nbits]) == 2 else (nbits, 0)
    return {"COARSE": coarse, "FINE": fine, "PARTS": coarse // fine if fine else 1}


@cache
def _tile(nbits: int, in_features: int, group_size: int, n_weights: int) -> dict[str, int]:
    """Bytes of a run, and runs and rows that a program reads at a time: about ``n_weights`` weights."""
    segment = _segment(nbits, in_features)
    run = gcd(VECTOR, group_size, segment)
    n_runs = n_weights // _n_slots(nbits) // run
    runs = min(gpu.power_of_two(segment // run), n_runs // MIN_ROWS)
    return {"RUN": run, "RUNS": runs, "ROWS": min(MAX_ROWS, n_runs // runs)}


def linear_few_tokens(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, *, nbits: int
) -> Tensor:
    """``x @ weight.T + bias`` from packed codes with groups along the inputs; float32 sums, dtype of ``x`` out.

    One token is multiplied in float32. Several are multiplied with the weight rounded to the dtype of ``x``.
    """
    from . import triton_kernels

    in_features, out_features, n_groups = x.shape[-1], W_q.shape[0], scale.shape[1]
    group_size, segment = in_features // n_groups, _segment(nbits, in_features)
    flat = x.reshape(-1, in_features).contiguous()
    weight = (W_q.contiguous(), scale.contiguous(), zero.contiguous())
    n_tokens = flat.shape[0]
    sizes = (out_features, in_features, W_q.shape[1], segment, n_groups)

    def one_token(form: TokenForm) -> Tensor:
        tile = _tile(nbits, in_features, group_size, form.weights)

        def launch(grid: tuple[int, int], written: gpu.Written, n_steps: int) -> None:
            triton_kernels.one_token[grid](
                *(flat, *weight, *written, *sizes, n_steps * tile["RUNS"]),
                **_planes(nbits),
                GROUP=group_size,
                **tile,
                num_warps=form.warps,
            )

        n_steps = -(-segment // (tile["RUN"] * tile["RUNS"]))
        return gpu.product_in_parts(x, bias, out_features, n_rows=tile["ROWS"], n_steps=n_steps, launch=launch)

    def few_tokens(form: DotForm) -> Tensor:
        n_bytes, tokens = _dot_bytes(nbits, in_features, group_size), gpu.dot_tokens(n_tokens)

        def launch(grid: tuple[int, int], written: gpu.Written, n_steps: int) -> None:
            triton_kernels.few_tokens[*grid, -(-n_tokens // tokens)](
                *(flat, *weight, *written, n_tokens, *sizes, n_steps),
                **_planes(nbits),
                GROUP=group_size,
                BYTES=n_bytes,
                ROWS=form.rows,
                TOKENS=tokens,
                PRODUCT=gpu.product_type(x.dtype),
                STAGES=form.stages,
                num_warps=form.warps,
            )

        n_steps = segment // n_bytes
        return gpu.product_in_parts(x, bias, out_features, n_rows=form.rows, n_steps=n_steps, launch=launch)

    facts = (nbits, out_features, in_features, group_size, x.dtype, scale.dtype)
    if n_tokens == 1:
        return one_token(gpu_tuning.fastest("hqq one_token", facts, TOKEN_FORMS, one_token, like=x))
    dot_facts = (*facts, gpu.dot_tokens(n_tokens))
    return few_tokens(gpu_tuning.fastest("hqq few_tokens", dot_facts, dot_forms(n_tokens), few_tokens, like=x))


def dequantize_rows(W_q: Tensor, scale: Tensor, zero: Tensor, *, nbits: int, rows: slice, into: Tensor) -> Tensor:
    """The reference's rows ``rows`` of the weight, written to ``into`` (n, in_features) in its dtype."""
    from . import triton_kernels

    n_rows, in_features = into.shape
    n_groups, segment = scale.shape[1], _segment(nbits, in_features)
    tile = _tile(nbits, in_features, in_features // n_groups, DENSE_TILE)
    grid = (-(-n_rows // tile["ROWS"]), -(-segment // (tile["RUN"] * tile["RUNS"])))
    with torch.cuda.device_of(into):
        triton_kernels.dequantize[grid](
            *(W_q.contiguous(), scale.contiguous(), zero.contiguous(), into),
            *(rows.start, n_rows, in_features, W_q.shape[1], segment, n_groups),
            GROUP=in_features // n_groups,
            **tile,
            **_planes(nbits),
        )
    return into
