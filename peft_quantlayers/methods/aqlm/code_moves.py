"""Moving AQLM codes down a gradient: which groups, and to which codes. Pure arithmetic; no layers, no optimizer.

Sources: Malinovskii et al. 2024, "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression", the V
step: a gradient step on a small subspace of the weights, projected onto the values that the codebooks can represent.
Shazeer and Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost": the scale of a gradient.
"""

import torch
from torch import Tensor

from quantlayers_kernels.aqlm.choice import chosen_codes, entry_sums, matrix_to_groups

# Width of the beam search over codes.
BEAM = 4


def scaled_gradient(gradient: Tensor) -> Tensor:
    """``gradient`` (n, m), float32, over the root of its factored second moment, of rows times columns.

    Raw gradients are largest in the columns of a few large inputs, which the loss is most sensitive to; a step of one
    length for all weights is then too long there, or too short everywhere else. Adam divides each weight's gradient by
    the root of its own second moment; that of rows times that of columns needs no memory from step to step.
    """
    squares = gradient.square()
    mean = squares.mean()
    if mean == 0:
        return gradient
    # Rooted before they are multiplied, which would not fit float32.
    of_rows, of_columns = squares.mean(1, keepdim=True).sqrt(), (squares.mean(0, keepdim=True) / mean).sqrt()
    return gradient / (of_rows * of_columns).clamp(min=torch.finfo(gradient.dtype).tiny)


def moved_codes(
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    gradient: Tensor,
    *,
    step: float,
    max_change: float,
    trust_ratio: float,
) -> Tensor:
    """Codes after the groups with the largest gradient moved towards ``W - eta * gradient``.

    ``eta`` makes ``step`` relative: the root mean square of ``eta * gradient`` is ``step`` times that of ``W``. A
    group gets new codes if they are nearer to the target than the old ones; to first order the loss then falls by at
    least ``|move|**2 / (2 * eta)`` if ``gradient`` is its own. (The paper takes Adam steps on a float copy of all
    weights instead, which needs as much memory as training the float model; a step here needs the gradient only.)

    Args:
        codes: (n_out, n_in, num_codebooks), int64, not negative. Not changed.
        codebooks: (num_codebooks, size, og, ig), float32.
        scales: (n_out,), float32.
        gradient: of the loss with respect to ``W``, or scaled, (n_out * og, n_in * ig), float32.
        step: relative size of the gradient step, as above.
        max_change: fraction of the groups that may change; their number is rounded down.
        trust_ratio: bound of ``|new W - W| / |W|``; the moves that gain least for their squared
            length are dropped until it holds.

    Returns:
        New codes, shaped as ``codes``.
    """
    n_in, num_codebooks = codes.shape[1:]
    _, _, out_group, in_group = codebooks.shape
    moved = codes.reshape(-1, num_codebooks).clone()
    entries = codebooks.flatten(2)
    group_scales = scales.repeat_interleave(n_in)[:, None]
    gradient = matrix_to_groups(gradient, out_group, in_group).flatten(0, 1)

    weight_energy = (entry_sums(moved, entries) * group_scales).square().sum()
    gradient_energy = gradient.square().sum()
    n_movable = int(max_change * len(moved))
    if n_movable == 0 or gradient_energy == 0:
        return codes.clone()
    eta = step * (weight_energy / gradient_energy).sqrt()

    chosen = gradient.square().sum(1).topk(n_movable).indices
    chosen_scales = group_scales[chosen]
    divisors = torch.where(chosen_scales == 0, torch.ones_like(chosen_scales), chosen_scales)
    old = entry_sums(moved[chosen], entries)
    target = old - eta * gradient[chosen] / divisors
    new_codes = chosen_codes(target, moved[chosen], entries, None, beam=BEAM)
    new = entry_sums(new_codes, entries)
    squared_scales = chosen_scales[:, 0].square()
    gain = ((target - old).square().sum(1) - (target - new).square().sum(1)) * squared_scales
    moves = (new - old).square().sum(1) * squared_scales

    order = (gain / moves.clamp(min=torch.finfo(moves.dtype).tiny)).argsort(descending=True, stable=True)
    is_trusted = moves[order].cumsum(0) <= trust_ratio**2 * weight_energy
    accepted = order[is_trusted & (gain[order] > 0)]
    moved[chosen[accepted]] = new_codes[accepted]
    return moved.view_as(codes)
