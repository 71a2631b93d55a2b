"""Choosing HQQ codes that minimise a layer's output error, one column after the other with all others fixed.

The output error is ``tr(D H D.T)`` for the difference ``D`` to the target weight. With the other columns fixed it is a
parabola in one code, with its minimum at the code plus ``(D H)[column] / (H[column, column] * step)``; ``D H`` is the
residual correlation. The function here is the definition; on a CPU the compiled kernel takes its place, with the same
codes up to ties in float32.
"""

import torch
from torch import Tensor

from .. import native
from ..interface import HQQChoice

# Columns whose correlation is updated while their codes are chosen; the others are updated by one matrix product
# afterwards. The compiled kernel updates a row only when one of its codes moves; plain torch updates all rows.
BLOCK_COLUMNS = 128
COMPILED_BLOCK_COLUMNS = 2048


def block_columns(correlation: Tensor) -> int:
    """How many columns it is best to give :func:`chosen_in_columns` at a time, for tensors like ``correlation``."""
    return COMPILED_BLOCK_COLUMNS if _is_compiled(correlation) else BLOCK_COLUMNS


def chosen_in_columns(
    correlation: Tensor, codes: Tensor, steps: Tensor, hessian: Tensor, *, max_code: int, sweeps: int
) -> Tensor:
    """Codes of neighbouring columns, chosen one column after the other with all others fixed, in ``sweeps`` sweeps.

    Args:
        correlation: ``D H``, the difference to the target weight times the Hessian's columns, (out_features, columns),
            float32. Not modified.
        codes: where to start, (out_features, columns), floating, whole. Not modified.
        steps: weight units per code step, (out_features, columns), float32, not 0.
        hessian: of these columns with each other, (columns, columns), float32, symmetric, with a positive diagonal.
        max_code: codes run from 0 to it.
        sweeps: number of passes over all columns.

    Returns:
        New codes, shaped and typed as ``codes``.

    Raises:
        ValueError: shapes do not fit together, or the devices differ.
    """
    columns = correlation.shape[1]
    for name, found, shape in (
        ("codes", codes.shape, correlation.shape),
        ("steps", steps.shape, correlation.shape),
        ("hessian", hessian.shape, (columns, columns)),
    ):
        if tuple(found) != tuple(shape):
            raise ValueError(
                f"{name} has the shape {tuple(found)}; it must be {shape} for a correlation of "
                f"{tuple(correlation.shape)}."
            )
    devices = {part.device for part in (correlation, codes, steps, hessian)}
    if len(devices) > 1:
        raise ValueError(
            f"correlation, codes, steps and hessian are on {sorted(map(str, devices))}; put them on one device."
        )
    if not correlation.numel():
        return codes.clone()
    if _is_compiled(correlation):
        return _compiled(correlation, codes, steps, hessian, max_code=max_code, sweeps=sweeps).to(codes.dtype)
    # Transposed, so that a column is contiguous.
    correlation, codes, steps = (
        part.t().clone(memory_format=torch.contiguous_format) for part in (correlation, codes, steps)
    )
    per_step = hessian.diagonal()[:, None] * steps
    for column in list(range(columns)) * sweeps:
        # The zero point cancels: only the number of steps from the present code matters.
        target = codes[column] + correlation[column] / per_step[column]
        chosen = target.round_().clamp_(0, max_code)
        moved = (chosen - codes[column]) * steps[column]
        codes[column] = chosen
        correlation.addr_(hessian[column], moved, alpha=-1)
    return codes.t()


def _is_compiled(correlation: Tensor) -> bool:
    return correlation.device.type == "cpu" and correlation.dtype == torch.float32 and native.is_available()


def _compiled(
    correlation: Tensor, codes: Tensor, steps: Tensor, hessian: Tensor, *, max_code: int, sweeps: int
) -> Tensor:
    correlation, codes = (part.clone(memory_format=torch.contiguous_format) for part in (correlation, codes.float()))
    steps, hessian = steps.float().contiguous(), hessian.float().contiguous()
    curvature = hessian.diagonal().contiguous()
    out_features, columns = correlation.shape
    choice = HQQChoice(
        codes=codes.data_ptr(),
        correlation=correlation.data_ptr(),
        steps=steps.data_ptr(),
        hessian=hessian.data_ptr(),
        curvature=curvature.data_ptr(),
        out_features=out_features,
        columns=columns,
        sweeps=sweeps,
        max_code=max_code,
    )
    native.call("ql_hqq_choose", choice)
    return codes
