"""Choosing AQLM codes: the codebook entries that minimise a group's output error, with all other groups fixed.

The output error is ``tr(D H D.T)`` for the difference ``D`` to the target weight. With the codes of all groups but
one fixed, it is ``sum.T B sum - 2 wanted.T sum`` in the sum of entries of that group, with its block ``B`` of the
Hessian; ``wanted`` is the residual correlation ``D H`` of the group plus ``B`` times its present sum. The functions
here are the definition; on a CPU the compiled kernel takes their place, with the same codes up to ties in float32.
"""

import torch
from torch import Tensor

from . import cpu

# Scores of candidates in memory at a time: 2**23 of float32 are 32 MiB. A GPU needs larger launches.
MAX_SCORES = 1 << 23
MAX_SCORES_OF_GPU = 1 << 27


def entry_sums(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Sums of the entries with the indices ``codes`` (..., M) in ``codebooks`` (M, size, d); (..., d)."""
    total = codebooks[0][codes[..., 0]]
    for m in range(1, codes.shape[-1]):
        total = total + codebooks[m][codes[..., m]]
    return total


def groups_to_matrix(groups: Tensor, out_group: int) -> Tensor:
    """(n_out, n_in, og * ig) to (n_out * og, n_in * ig)."""
    n_out, n_in, d = groups.shape
    if out_group == 1:
        return groups.reshape(n_out, n_in * d)
    return groups.view(n_out, n_in, out_group, -1).permute(0, 2, 1, 3).reshape(n_out * out_group, -1)


def matrix_to_groups(matrix: Tensor, out_group: int, in_group: int) -> Tensor:
    """(n_out * og, n_in * ig) to (n_out, n_in, og * ig)."""
    n_out, n_in = matrix.shape[0] // out_group, matrix.shape[1] // in_group
    if out_group == 1:
        return matrix.reshape(n_out, n_in, in_group)
    return matrix.view(n_out, out_group, n_in, in_group).permute(0, 2, 1, 3).reshape(n_out, n_in, -1)


def best_entries(wanted: Tensor, entries: Tensor, own: Tensor) -> Tensor:
    """Index of the entry with the lowest ``own - 2 wanted.T entry`` for each row of ``wanted``.

    Args:
        wanted: (n, d), float32.
        entries: (size, d), float32.
        own: (size,), float32.

    Returns:
        (n,), int64.
    """
    if cpu.can_choose(wanted, entries):
        return cpu.best_entries(wanted, entries, own)
    parts = wanted.split(max(1, _max_scores(wanted) // len(entries)))
    return torch.cat([torch.addmm(own, part, entries.t(), alpha=-2).argmin(1) for part in parts])


def _max_scores(tensor: Tensor) -> int:
    return MAX_SCORES if tensor.device.type == "cpu" else MAX_SCORES_OF_GPU


def chosen_codes(wanted: Tensor, codes: Tensor, codebooks: Tensor, block: Tensor | None, *, beam: int) -> Tensor:
    """Codes that minimise ``sum.T block sum - 2 wanted.T sum`` for sums of entries, one codebook after the other.

    Each codebook's code is chosen again with the others fixed, in a beam search of width ``beam``. The result is never
    worse than ``codes``.

    Args:
        wanted: (n, d), float32.
        codes: where to start, (n, num_codebooks), int64.
        codebooks: (num_codebooks, size, d), float32.
        block: (d, d), float32, symmetric; None for the identity.
        beam: width of the beam search; 1 is iterated conditional modes.

    Returns:
        (n, num_codebooks), int64.
    """
    if cpu.can_choose(wanted, codebooks):
        hessian = torch.eye(wanted.shape[1], dtype=wanted.dtype, device=wanted.device) if block is None else block
        correlation = wanted - entry_sums(codes, codebooks) @ hessian
        return cpu.choose(correlation, codes[:, None], codebooks, hessian, out_group=1, beam=beam)[:, 0]
    num_codebooks, size, _ = codebooks.shape
    projected = codebooks if block is None else codebooks @ block
    own = (projected * codebooks).sum(2)
    beam = min(beam, size) if num_codebooks > 1 else 1
    step = max(1, _max_scores(wanted) // (size * beam))
    found = []
    for start in range(0, wanted.shape[0], step):
        here, states = wanted[start : start + step], codes[start : start + step, None]
        for m in range(num_codebooks):
            rest = entry_sums(states, codebooks) - codebooks[m][states[..., m]]
            held = rest if block is None else rest @ block
            still_wanted = (here[:, None] - held).flatten(0, 1)
            scores = torch.addmm(own[m], still_wanted, codebooks[m].t(), alpha=-2).view(*states.shape[:2], size)
            width = beam if m < num_codebooks - 1 else 1
            if states.shape[1] > 1:
                scores += ((held - 2 * here[:, None]) * rest).sum(2, keepdim=True)
            scores = scores.flatten(1)
            best = scores.argmin(1, keepdim=True) if width == 1 else scores.topk(width, largest=False).indices
            states = states.gather(1, (best // size)[..., None].expand(-1, -1, num_codebooks)).clone()
            states[..., m] = best % size
        found.append(states[:, 0])
    return torch.cat(found)


def chosen_in_columns(
    correlation: Tensor, codes: Tensor, codebooks: Tensor, hessian: Tensor, *, out_group: int, beam: int
) -> Tensor:
    """Codes of neighbouring groups, chosen one group after the other with all others fixed.

    Args:
        correlation: ``D H``, the difference to the target weight times the Hessian's columns of these groups, in
            codebook units, (n_out * out_group, columns), float32. Not modified.
        codes: where to start, (n_out, n_groups, num_codebooks), int64. Not modified.
        codebooks: (num_codebooks, size, d), float32.
        hessian: of these columns with each other, (columns, columns), float32, symmetric.
        out_group: outputs of a group.
        beam: as for :func:`chosen_codes`.

    Returns:
        New codes, shaped as ``codes``.
    """
    if cpu.can_choose(correlation, codebooks):
        return cpu.choose(correlation, codes, codebooks, hessian, out_group=out_group, beam=beam)
    codes, correlation = codes.clone(), correlation.clone()
    in_group = codebooks.shape[2] // out_group
    identity = torch.eye(out_group, dtype=hessian.dtype, device=hessian.device)
    for group in range(codes.shape[1]):
        here = slice(group * in_group, (group + 1) * in_group)
        block = torch.kron(identity, hessian[here, here])
        before = entry_sums(codes[:, group], codebooks)
        wanted = matrix_to_groups(correlation[:, here], out_group, in_group)[:, 0] + before @ block
        codes[:, group] = chosen_codes(wanted, codes[:, group], codebooks, block, beam=beam)
        moved = entry_sums(codes[:, group], codebooks) - before
        correlation -= groups_to_matrix(moved[:, None], out_group) @ hessian[here]
    return codes
