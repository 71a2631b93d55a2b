"""Choosing HQQ codes: those that bring a layer's outputs closest, one column after the other with all others held.

The error is ``tr(D H D.T)`` for the difference ``D`` to the wanted weight. With the other columns held it is a
parabola in one code, whose least place is the code plus ``(D H)[column] / (H[column, column] * step)``. The function
here is the definition; on a CPU the compiled kernel takes its place, with the same codes but for ties in float32.
"""

import torch
from torch import Tensor

from .. import native
from ..interface import HQQChoice

# Columns whose pull is kept up to date while their codes are chosen; the others wait for one matrix product. A row of
# the compiled kernel only touches what a code that moves pulls on; plain torch touches all, whatever moves.
BLOCK_COLUMNS = 128
COMPILED_BLOCK_COLUMNS = 2048


def block_columns(pull: Tensor) -> int:
    """How many columns it is best to give :func:`chosen_in_columns` at a time, for tensors like ``pull``."""
    return COMPILED_BLOCK_COLUMNS if _is_compiled(pull) else BLOCK_COLUMNS


def chosen_in_columns(
    pull: Tensor, codes: Tensor, steps: Tensor, hessian: Tensor, *, max_code: int, sweeps: int
) -> Tensor:
    """Codes of neighbouring columns, chosen one column after the other with all others held, ``sweeps`` times over.

    Args:
        pull: the difference to the wanted weight times the Hessian's columns, (out_features, columns), float32. Not
            changed.
        codes: where to start, (out_features, columns), floating, whole. Not changed.
        steps: weight units per code step, (out_features, columns), float32, not 0.
        hessian: of these columns with each other, (columns, columns), float32, symmetric, with a positive diagonal.
        max_code: codes run from 0 to it.
        sweeps: how often.

    Returns:
        New codes, shaped and typed as ``codes``.

    Raises:
        ValueError: shapes or devices contradict each other.
    """
    columns = pull.shape[1]
    for name, found, shape in (
        ("codes", codes.shape, pull.shape),
        ("steps", steps.shape, pull.shape),
        ("hessian", hessian.shape, (columns, columns)),
    ):
        if tuple(found) != tuple(shape):
            raise ValueError(f"{name} has the shape {tuple(found)}; a pull of {tuple(pull.shape)} wants {shape}.")
    devices = {part.device for part in (pull, codes, steps, hessian)}
    if len(devices) > 1:
        raise ValueError(f"pull, codes, steps and hessian are on {sorted(map(str, devices))}; put them on one device.")
    if not pull.numel():
        return codes.clone()
    if _is_compiled(pull):
        return _compiled(pull, codes, steps, hessian, max_code=max_code, sweeps=sweeps).to(codes.dtype)
    # Columns lie contiguous in what follows.
    pull, codes, steps = (part.t().clone(memory_format=torch.contiguous_format) for part in (pull, codes, steps))
    per_step = hessian.diagonal()[:, None] * steps
    for column in list(range(columns)) * sweeps:
        # The zero cancels: what is asked is how many steps to move from the code that is there.
        wanted = codes[column] + pull[column] / per_step[column]
        chosen = wanted.round_().clamp_(0, max_code)
        moved = (chosen - codes[column]) * steps[column]
        codes[column] = chosen
        pull.addr_(hessian[column], moved, alpha=-1)
    return codes.t()


def _is_compiled(pull: Tensor) -> bool:
    return pull.device.type == "cpu" and pull.dtype == torch.float32 and native.is_available()


def _compiled(pull: Tensor, codes: Tensor, steps: Tensor, hessian: Tensor, *, max_code: int, sweeps: int) -> Tensor:
    pull, codes = (part.clone(memory_format=torch.contiguous_format) for part in (pull, codes.float()))
    steps, hessian = steps.float().contiguous(), hessian.float().contiguous()
    curvature = hessian.diagonal().contiguous()
    out_features, columns = pull.shape
    choice = HQQChoice(
        codes=codes.data_ptr(),
        correlation=pull.data_ptr(),
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
