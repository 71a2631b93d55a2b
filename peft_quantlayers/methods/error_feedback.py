"""Rounding with error feedback: each column is rounded after the errors of those before it were added to it.

Pure arithmetic in float32. The output error is ``tr(D H D.T)`` for the difference ``D`` of the weights and the second
moment ``H`` of the inputs. With ``H = U S U.T``, ``U`` unit upper triangular and ``S`` diagonal, it is the sum over
columns of ``S[k, k] * |D U[:, k]|^2``, and each term is least where the column plus the errors before it times ``U``
is rounded to the nearest value. The codes are those of Frantar et al. 2022 (GPTQ) on the same grid, by the equivalent
form of Chee et al. 2023 (QuIP), which inverts no matrix.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .any_threads import cholesky_

# Columns whose errors are added one by one; one matrix product adds those of the columns before.
BLOCK_COLUMNS = 128
# Fractions of the mean diagonal that are added where H has no factors, in turn.
DAMPINGS = (0.0, 1e-6, 1e-4, 1e-2, 1.0)


def round_with_feedback(
    weight: Tensor, hessian: Tensor, rounded: Callable[[Tensor, int], Tensor], *, act_order: bool = False
) -> None:
    """Call ``rounded`` for each column in turn.

    Args:
        weight: (out_features, in_features), float32; not modified.
        hessian: (in_features, in_features), float32, symmetric, with a positive diagonal.
        rounded: for a target (out_features,) and the number of its column, the value that stands for it.
        act_order: columns of large inputs come first, so that those after them make up for their errors.
    """
    n_columns = weight.shape[1]
    order = list(range(n_columns))
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True).tolist()
        hessian = hessian[order][:, order]
    factor = upper_factor(hessian)
    errors = weight.new_zeros(n_columns, len(weight))  # transposed, so that a column is contiguous
    for start in range(0, n_columns, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, n_columns)
        before = factor[:start, start:stop].t() @ errors[:start]
        for at in range(start, stop):
            column = weight[:, order[at]]
            target = column + before[at - start] + factor[start:at, at] @ errors[start:at]
            errors[at] = column - rounded(target, order[at])


def upper_factor(hessian: Tensor) -> Tensor:
    """The unit upper triangular ``U`` of ``H = U S U.T``; of ``H`` with some damping if it is singular."""
    mean = hessian.diagonal().mean()
    for damping in DAMPINGS:
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(damping * mean)
        if cholesky_(damped):
            break
    factor = damped.tril_().flip(0, 1)
    return factor.div_(factor.diagonal().clone())
