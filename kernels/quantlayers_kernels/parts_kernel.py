"""How the kernels of products write what they computed, in one part or in several. Imports Triton."""

import triton
import triton.language as tl


@triton.jit
def _write(total, at, mask, bias, row, is_row, y):
    if bias is not None:
        total += tl.load(bias + row, mask=is_row, other=0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def write_product(total, at, mask, bias, row, is_row, y, parts, arrived, n_numbers):
    """``y[at] = total + bias[row]``, where ``total``, float32, is the sum over all inputs, or over those of a part.

    A part is that of the programs with its number along the second axis of the grid. ``parts`` is None where there is
    one, else memory for float32 (n_parts, n_numbers), and ``arrived`` holds a zero for each program of the grid's
    other axes. The program that comes last there adds the parts up, from the first to the last whoever comes when.
    """
    if parts is None:
        _write(total, at, mask, bias, row, is_row, y)
    else:
        tl.store(parts + tl.program_id(1) * n_numbers + at, total, mask=mask)
        place = arrived + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        tl.debug_barrier()  # all threads have written before one says so
        if tl.atomic_add(place, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1:
            added = tl.zeros_like(total)
            for part in range(tl.num_programs(1)):
                added += tl.load(parts + part * n_numbers + at, mask=mask, other=0, volatile=True)
            _write(added, at, mask, bias, row, is_row, y)
