"""HQQ in Triton: dense rows, the product with one token, and with a few. Groups along the inputs (``axis=1``).

A row of codes is read in the order of its bytes. Byte ``j`` of a plane of ``p`` bits holds ``8 / p`` codes which are
``segment`` inputs apart, ``segment`` being the bytes of the plane's row: slot ``s`` is the code of input ``j + s *
segment``. So bytes, inputs and dense weights are all read and written in contiguous runs, and unpacking is a shift and
a mask. Widths of two planes are read in the segments of the finer plane (``FINE`` bits; 0 where there is one plane
alone). A row of the other one (``COARSE`` bits) is ``PARTS`` segments long, and the slot of the fine plane is ``SLOT *
PARTS + PART``. See ``bitpack/reference.py``; what the sizes must fulfil is checked in ``gpu.py``.
"""

import triton
import triton.language as tl

from ..parts_kernel import write_product


@triton.jit
def _slot(coarse, fine, PART: tl.constexpr, SLOT: tl.constexpr, COARSE: tl.constexpr, FINE: tl.constexpr,
          PARTS: tl.constexpr):  # fmt: skip
    """Codes, float32, of slot ``SLOT`` of a coarse byte in part ``PART``, and of the fine byte that belongs to it.

    The bits above a code are set, not cleared, together with those of 2**23: one operation instead of two. What they
    add up to is then subtracted, which is exact and cheaper than a conversion.
    """
    KEPT: tl.constexpr = (1 << COARSE) - 1
    codes = coarse >> (COARSE * SLOT)
    if FINE > 0:
        SHIFT: tl.constexpr = FINE * (SLOT * PARTS + PART) - COARSE
        fine = fine >> SHIFT if SHIFT > 0 else fine << -SHIFT
        codes = (codes & KEPT) | (fine & ~KEPT)
    ABOVE: tl.constexpr = (1 << (8 + COARSE)) - (1 << (COARSE + FINE)) if FINE > 0 else 256 - (1 << COARSE)
    return (codes | (0x4B000000 | ABOVE)).to(tl.float32, bitcast=True) - (8388608.0 + ABOVE)


@triton.jit(do_not_specialize=["first_row"])
def dequantize(
    W_q, scale, zero, out,
    first_row, n_rows, in_features, row_bytes, segment, n_groups,
    GROUP: tl.constexpr, COARSE: tl.constexpr, FINE: tl.constexpr, PARTS: tl.constexpr,
    RUN: tl.constexpr, RUNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows ``first_row`` to ``first_row + n_rows``, written to ``out`` (n_rows, in_features) in its dtype.

    A program writes ``ROWS`` rows of ``RUNS`` runs of ``RUN`` bytes, all slots. A run lies in one group.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    run = tl.program_id(1) * RUNS + tl.arange(0, RUNS)
    is_inside = (row < n_rows)[:, None] & (run * RUN < segment)[None, :]
    row64 = row.to(tl.int64)
    metadata_row = (first_row + row64) * n_groups
    j = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    byte = W_q + (first_row + row64)[:, None, None] * row_bytes + j[None]
    fine = tl.zeros((ROWS, RUNS, RUN), tl.int32)
    if FINE > 0:
        fine = tl.load(byte + PARTS * segment, mask=is_inside[:, :, None], other=0).to(tl.int32)
    for part in tl.static_range(PARTS):
        coarse = tl.load(byte + part * segment, mask=is_inside[:, :, None], other=0).to(tl.int32)
        for slot in tl.static_range(8 // COARSE):
            first_input = (slot * PARTS + part) * segment
            group = (first_input + run * RUN) // GROUP
            has_group = is_inside & (first_input + run * RUN < in_features)[None, :]
            at = metadata_row[:, None] + group[None, :]
            s = tl.load(scale + at, mask=has_group, other=0).to(tl.float32)
            z = tl.load(zero + at, mask=has_group, other=0).to(tl.float32)
            w = (_slot(coarse, fine, part, slot, COARSE, FINE, PARTS) - z[:, :, None]) * s[:, :, None]
            k = first_input + j
            to = out + row64[:, None, None] * in_features + k[None]
            tl.store(to, w.to(out.dtype.element_ty), mask=has_group[:, :, None] & (k < in_features)[None])


@triton.jit
def one_token(
    x, W_q, scale, zero, bias, y, parts, arrived,
    n_rows, in_features, row_bytes, segment, n_groups, runs_per_split,
    GROUP: tl.constexpr, COARSE: tl.constexpr, FINE: tl.constexpr, PARTS: tl.constexpr,
    RUN: tl.constexpr, RUNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``y[row] = sum over the inputs of weight * x (+ bias)``, for x (in_features,).

    A run is one vector load of a thread and lies in one group: its codes are multiplied and added up by the thread
    that read them, and scaled once.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < n_rows
    row64 = row.to(tl.int64)
    metadata_row = row64 * n_groups
    first_run = tl.program_id(1) * runs_per_split
    total = tl.zeros((ROWS, RUNS), tl.float32)
    for start in range(first_run, first_run + runs_per_split, RUNS):
        run = start + tl.arange(0, RUNS)
        is_run = (run < first_run + runs_per_split) & (run * RUN < segment)
        is_inside = is_row[:, None] & is_run[None, :]
        j = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
        byte = W_q + row64[:, None, None] * row_bytes + j[None]
        fine = tl.zeros((ROWS, RUNS, RUN), tl.int32)
        if FINE > 0:
            fine = tl.load(byte + PARTS * segment, mask=is_inside[:, :, None], other=0).to(tl.int32)
        for part in tl.static_range(PARTS):
            coarse = tl.load(byte + part * segment, mask=is_inside[:, :, None], other=0).to(tl.int32)
            for slot in tl.static_range(8 // COARSE):
                first_input = (slot * PARTS + part) * segment
                k = first_input + j
                x_slot = tl.load(x + k, mask=is_run[:, None] & (k < in_features), other=0).to(tl.float32)
                has_group = is_inside & (first_input + run * RUN < in_features)[None, :]
                at = metadata_row[:, None] + ((first_input + run * RUN) // GROUP)[None, :]
                s = tl.load(scale + at, mask=has_group, other=0).to(tl.float32)
                z = tl.load(zero + at, mask=has_group, other=0).to(tl.float32)
                w = _slot(coarse, fine, part, slot, COARSE, FINE, PARTS) - z[:, :, None]
                total += tl.sum(w * x_slot[None], axis=2) * s
    result = tl.sum(total, axis=1)
    write_product(result, row, is_row, bias, row, is_row, y, parts, arrived, n_rows)


@triton.jit(do_not_specialize=["n_tokens", "steps_per_split"])
def few_tokens(
    x, W_q, scale, zero, bias, y, parts, arrived,
    n_tokens, n_rows, in_features, row_bytes, segment, n_groups, steps_per_split,
    GROUP: tl.constexpr, COARSE: tl.constexpr, FINE: tl.constexpr, PARTS: tl.constexpr,
    BYTES: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, PRODUCT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """``y[token, row] = sum over the inputs of weight * x (+ bias)``, for x (n_tokens, in_features).

    Each weight is decoded once for ``TOKENS`` tokens, rounded to the dtype of x and multiplied on the tensor cores
    with a float32 sum. A step reads ``BYTES`` bytes of each row, whose codes of one slot lie in one group.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < n_rows
    row64 = row.to(tl.int64)
    metadata_row = row64 * n_groups
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < n_tokens
    first_step = tl.program_id(1) * steps_per_split
    last_step = tl.minimum(first_step + steps_per_split, segment // BYTES)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(first_step, last_step, num_stages=STAGES):
        j = step * BYTES + tl.arange(0, BYTES)
        byte = W_q + row64[:, None] * row_bytes + j[None, :]
        fine = tl.zeros((ROWS, BYTES), tl.int32)
        if FINE > 0:
            fine = tl.load(byte + PARTS * segment, mask=is_row[:, None], other=0).to(tl.int32)
        for part in tl.static_range(PARTS):
            coarse = tl.load(byte + part * segment, mask=is_row[:, None], other=0).to(tl.int32)
            for slot in tl.static_range(8 // COARSE):
                first_input = (slot * PARTS + part) * segment
                at = metadata_row + (first_input + step * BYTES) // GROUP
                s = tl.load(scale + at, mask=is_row, other=0).to(tl.float32)
                z = tl.load(zero + at, mask=is_row, other=0).to(tl.float32)
                w = (_slot(coarse, fine, part, slot, COARSE, FINE, PARTS) - z[:, None]) * s[:, None]
                k = first_input + j
                x_slot = tl.load(x + token[None, :] * in_features + k[:, None], mask=is_token[None, :], other=0)
                w = w.to(x.dtype.element_ty).to(PRODUCT)
                total = tl.dot(w, x_slot.to(PRODUCT), total, input_precision="ieee")
    at, is_inside = token[None, :] * n_rows + row[:, None], is_row[:, None] & is_token[None, :]
    write_product(total, at, is_inside, bias, row[:, None], is_row[:, None], y, parts, arrived, n_tokens * n_rows)
