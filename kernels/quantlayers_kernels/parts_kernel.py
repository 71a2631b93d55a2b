"""The kernel that adds up the parts of a product. Imports Triton."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_numbers"])
def add_parts(parts, bias, y, n_numbers, out_features, N_PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """``y[i] = sum over the parts of parts[part, i] (+ bias[i % out_features])``, from the first part to the last.

    ``parts`` is float32, (N_PARTS, n_numbers); ``y`` (n_numbers,) has a dtype of its own.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_inside = i < n_numbers
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(N_PARTS):
        total += tl.load(parts + part * n_numbers + i, mask=is_inside, other=0)
    if bias is not None:
        total += tl.load(bias + i % out_features, mask=is_inside, other=0).to(tl.float32)
    tl.store(y + i, total.to(y.dtype.element_ty), mask=is_inside)
