"""AQLM in Triton: dense rows, the product with one token, and with a few.

Groups of inputs lie along the second axis of a tile and the ``IN_GROUP`` inputs of a group along the third, padded to
``IN``, a power of two: an entry of eight halves is one vector load. Codes are masked with the size of the codebook, so
that any stored code reads inside of it. What the sizes must fulfil is checked in ``gpu.py``.
"""

import triton
import triton.language as tl

from ..parts_kernel import write_product


@triton.jit
def _weights(
    codes, codebooks, row, is_row, i, is_group, n_in_groups,
    NUM_CODEBOOKS: tl.constexpr, SIZE: tl.constexpr, OUT_GROUP: tl.constexpr, IN_GROUP: tl.constexpr,
    IN: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Sums of entries, (rows, groups, IN), float32, of rows ``row`` and input groups ``i``; not scaled."""
    is_inside = is_row[:, None] & is_group[None, :]
    at = codes + ((row // OUT_GROUP)[:, None] * n_in_groups + i[None, :]) * NUM_CODEBOOKS
    b = tl.arange(0, IN)[None, None, :]
    is_entry = is_inside[:, :, None] & (b < IN_GROUP)
    first = codebooks + ((row % OUT_GROUP).to(tl.int32) * IN_GROUP)[:, None, None] + b
    total = _entries(at, first, is_inside, is_entry, 0, SIZE, OUT_GROUP * IN_GROUP, CACHE)
    for m in tl.static_range(1, NUM_CODEBOOKS):
        total += _entries(at, first, is_inside, is_entry, m, SIZE, OUT_GROUP * IN_GROUP, CACHE)
    return total


@triton.jit
def _entries(
    at, first, is_inside, is_entry,
    m: tl.constexpr, SIZE: tl.constexpr, ENTRY: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """What the codes of codebook ``m`` stand for, float32; ``first`` points into the first entry of all."""
    code = tl.load(at + m, mask=is_inside, other=0).to(tl.int32) & (SIZE - 1)
    entry = first + ((m * SIZE + code) * ENTRY)[:, :, None]
    return tl.load(entry, mask=is_entry, other=0, cache_modifier=CACHE).to(tl.float32)


@triton.jit(do_not_specialize=["first_row"])
def dequantize(
    codes, codebooks, scales, out,
    first_row, n_rows, n_in_groups,
    NUM_CODEBOOKS: tl.constexpr, SIZE: tl.constexpr, OUT_GROUP: tl.constexpr, IN_GROUP: tl.constexpr,
    IN: tl.constexpr, CACHE: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows ``first_row`` to ``first_row + n_rows``, written to ``out`` (n_rows, in_features) in its dtype."""
    local = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row = first_row + local
    is_row = local < n_rows
    i = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    is_group = i < n_in_groups
    w = _weights(codes, codebooks, row, is_row, i, is_group, n_in_groups,
                 NUM_CODEBOOKS, SIZE, OUT_GROUP, IN_GROUP, IN, CACHE)  # fmt: skip
    w *= tl.load(scales + row // OUT_GROUP, mask=is_row, other=0).to(tl.float32)[:, None, None]
    b = tl.arange(0, IN)[None, None, :]
    to = out + (local[:, None] * n_in_groups + i[None, :])[:, :, None] * IN_GROUP + b
    is_inside = (is_row[:, None] & is_group[None, :])[:, :, None] & (b < IN_GROUP)
    tl.store(to, w.to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def one_token(
    x, codes, codebooks, scales, bias, y, parts, arrived,
    n_rows, n_in_groups, groups_per_split,
    NUM_CODEBOOKS: tl.constexpr, SIZE: tl.constexpr, OUT_GROUP: tl.constexpr, IN_GROUP: tl.constexpr,
    IN: tl.constexpr, CACHE: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``y[row] = sum over the inputs of weight * x (+ bias)``, for x (in_features,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < n_rows
    row64 = row.to(tl.int64)
    first = tl.program_id(1) * groups_per_split
    last = tl.minimum(first + groups_per_split, n_in_groups)
    b = tl.arange(0, IN)[None, :]
    total = tl.zeros((ROWS, GROUPS), tl.float32)
    for start in range(first, last, GROUPS):
        i = start + tl.arange(0, GROUPS)
        is_group = i < last
        w = _weights(codes, codebooks, row64, is_row, i, is_group, n_in_groups,
                     NUM_CODEBOOKS, SIZE, OUT_GROUP, IN_GROUP, IN, CACHE)  # fmt: skip
        x_groups = tl.load(x + i[:, None] * IN_GROUP + b, mask=is_group[:, None] & (b < IN_GROUP), other=0)
        total += tl.sum(w * x_groups.to(tl.float32)[None], axis=2)
    result = tl.sum(total, axis=1) * tl.load(scales + row // OUT_GROUP, mask=is_row, other=0).to(tl.float32)
    write_product(result, row, is_row, bias, row, is_row, y, parts, arrived, n_rows)


@triton.jit(do_not_specialize=["n_tokens"])
def few_tokens(
    x, codes, codebooks, scales, bias, y, parts, arrived,
    n_tokens, n_rows, n_in_groups, groups_per_split,
    NUM_CODEBOOKS: tl.constexpr, SIZE: tl.constexpr, OUT_GROUP: tl.constexpr, IN_GROUP: tl.constexpr,
    IN: tl.constexpr, CACHE: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    PRODUCT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``y[token, row] = sum over the inputs of weight * x (+ bias)``, for x (n_tokens, in_features).

    Each weight is decoded once for ``TOKENS`` tokens, rounded to the dtype of x and multiplied on the tensor cores
    with a float32 sum.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < n_rows
    row64 = row.to(tl.int64)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < n_tokens
    first = tl.program_id(1) * groups_per_split
    last = tl.minimum(first + groups_per_split, n_in_groups)
    s = tl.load(scales + row // OUT_GROUP, mask=is_row, other=0).to(tl.float32)
    input_of = tl.arange(0, GROUPS * IN)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in tl.range(first, last, GROUPS, num_stages=STAGES):
        i = start + tl.arange(0, GROUPS)
        w = _weights(codes, codebooks, row64, is_row, i, i < last, n_in_groups,
                     NUM_CODEBOOKS, SIZE, OUT_GROUP, IN_GROUP, IN, CACHE)  # fmt: skip
        w = tl.reshape(w * s[:, None, None], (ROWS, GROUPS * IN))
        if IN == IN_GROUP:
            k = start * IN + input_of
            is_input = k < last * IN
        else:
            k = (start + input_of // IN) * IN_GROUP + input_of % IN
            is_input = (input_of % IN < IN_GROUP) & (start + input_of // IN < last)
        x_at = x + token[None, :] * (n_in_groups * IN_GROUP) + k[:, None]
        x_groups = tl.load(x_at, mask=is_token[None, :] & is_input[:, None], other=0)
        w = w.to(x.dtype.element_ty).to(PRODUCT)
        total = tl.dot(w, x_groups.to(PRODUCT), total, input_precision="ieee")
    at, is_inside = token[None, :] * n_rows + row[:, None], is_row[:, None] & is_token[None, :]
    write_product(total, at, is_inside, bias, row[:, None], is_row[:, None], y, parts, arrived, n_tokens * n_rows)
