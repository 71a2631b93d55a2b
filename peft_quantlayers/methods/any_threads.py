"""Sums and Cholesky factors whose bits do not depend on how many threads a CPU computes them with.

Torch splits a sum of all elements over its threads, and LAPACK factors matrices of more than 128 rows in another order
with several. The order is fixed here, at the same speed. Matrix products, triangular solves and sums along a dimension
had the same bits with one to four threads wherever it was tried, as ``tests/methods/test_any_threads.py`` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows that LAPACK factors with the same bits, whatever the number of threads.
_BLOCK_ROWS = 128


def sum_of_all(x: Tensor) -> Tensor:
    """The sum of all elements of ``x``, a scalar; one dimension after the other, from the last."""
    while x.dim():
        x = x.sum(-1)
    return x


def cholesky_(matrix: Tensor) -> bool:
    """Write the lower factor of ``matrix`` (n, n), symmetric, over its lower triangle; False if there is none.

    What lies above the diagonal is of no use then; nor is the rest, if there is no factor.
    """
    n = len(matrix)
    if matrix.device.type != "cpu" or n <= _BLOCK_ROWS:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        matrix.copy_(factor)
        return not failed
    for start in range(0, n, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, n)
        columns = matrix[start:, start:stop] - matrix[start:, :start] @ matrix[start:stop, :start].t()
        height = stop - start
        corner, failed = torch.linalg.cholesky_ex(columns[:height])
        if failed:
            return False
        matrix[start:stop, start:stop] = corner
        matrix[stop:, start:stop] = torch.linalg.solve_triangular(corner, columns[height:].t(), upper=False).t()
    return True
