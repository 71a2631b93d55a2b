"""Add a small change to AQLM codes without data: codebooks and scales stay.

An adapter's change is far smaller than the distance between codebook entries, so that coding anew changes nothing.
Here each group may take another entry from one codebook, and does so with a probability that makes the change right
on average: the entry whose step ``v`` is shortest for what it brings along the change ``t``, with probability
``|t|**2 / <t, v>``. Which groups move is fixed by a hash of their position. Only the nearest entries are tried.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import native
from ..dither import white_noise
from ..tiled import rows_per_tile
from .cpu import can_dequantize
from .reference import wrapped_codes

# Entries nearest to the one that a group has; the step that is taken is a short one. A multiple of the widest vector.
NEIGHBOURS = 32
# Numbers in a buffer of distances, or of steps: 64 MiB of float32.
MAX_BUFFER = 1 << 24


def updated_codes(codes: Tensor, codebooks: Tensor, scales: Tensor, change: Callable[[slice], Tensor]) -> Tensor:
    """New codes for a weight to which ``change`` is added; where that is zero they stay.

    Args:
        codes: (out_features / og, in_features / ig, num_codebooks), int8 or int16. Not changed.
        codebooks: (num_codebooks, size, og, ig), floating.
        scales: (out_features / og, 1, 1, 1), floating, not zero.
        change: rows of the change for a range of rows, (n, in_features), float32.
    """
    num_codebooks, size, out_group, in_group = codebooks.shape
    n_out, n_in, _ = codes.shape
    steps, per_energy, entries = _steps(codebooks.float().flatten(2))
    moved = codes.contiguous().clone()
    noise = white_noise(n_out * n_in, codes.device)
    is_compiled = can_dequantize(codes, codebooks, scales)
    at_a_time = max(1, rows_per_tile(n_out * out_group, n_in * in_group, codes.device) // out_group)
    for start in range(0, n_out, at_a_time):
        part = slice(start, min(start + at_a_time, n_out))
        rows = change(slice(part.start * out_group, part.stop * out_group))
        groups = rows.view(-1, out_group, n_in, in_group).transpose(1, 2) / scales[part].float()
        groups = groups.reshape(-1, out_group * in_group)
        here = moved[part].view(-1, num_codebooks)
        there = noise[part.start * n_in : part.stop * n_in]
        if is_compiled:
            native.call(
                "ql_aqlm_update",
                *(here.data_ptr(), groups.data_ptr(), steps.data_ptr(), per_energy.data_ptr()),
                *(entries.data_ptr(), there.data_ptr(), len(here), num_codebooks, size, groups.shape[1]),
                *(steps.shape[-1], codes.element_size()),
            )
        else:
            _move(here, groups, steps, per_energy, entries, there)
    return moved


def _steps(codebooks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From each entry to its nearest ones, for ``codebooks`` (num_codebooks, size, d), float32.

    Returns:
        The steps (num_codebooks, size, d, n); ``1 / |step|**2``, 0 where there is no step, (num_codebooks, size, n);
        and the entries, (num_codebooks, size, n), int32.
    """
    num_codebooks, size, d = codebooks.shape
    n = min(NEIGHBOURS, size)
    steps = codebooks.new_zeros(num_codebooks, size, d, NEIGHBOURS)
    per_energy = codebooks.new_zeros(num_codebooks, size, NEIGHBOURS)
    entries = torch.zeros(num_codebooks, size, NEIGHBOURS, dtype=torch.int32, device=codebooks.device)
    at_a_time = max(1, MAX_BUFFER // max(size, d * NEIGHBOURS))
    for m, codebook in enumerate(codebooks):
        for start in range(0, size, at_a_time):
            part = slice(start, start + at_a_time)
            nearest = torch.cdist(codebook[part], codebook).topk(n, largest=False).indices
            step = codebook[nearest] - codebook[part, None]
            energy = step.square().sum(2)
            steps[m, part, :, :n] = step.transpose(1, 2)
            per_energy[m, part, :n] = torch.where(energy > 0, 1 / energy.clamp(min=1e-30), 0.0)
            entries[m, part, :n] = nearest.int()
    return steps, per_energy, entries


def _move(codes: Tensor, change: Tensor, steps: Tensor, per_energy: Tensor, entries: Tensor, noise: Tensor) -> None:
    """Move ``codes`` (n, num_codebooks) in place, for changes (n, d) in codebook units and noise (n,)."""
    num_codebooks, size, d, _ = steps.shape
    at_a_time = max(1, MAX_BUFFER // (d * NEIGHBOURS))
    for start in range(0, len(codes), at_a_time):
        part = slice(start, start + at_a_time)
        t = change[part]
        chosen = codes[part].long() % size
        along = torch.stack([(t[:, None] @ steps[m][chosen[:, m]])[:, 0] for m in range(num_codebooks)], dim=1)
        gain = along * torch.stack([per_energy[m][chosen[:, m]] for m in range(num_codebooks)], dim=1)
        best, where = gain.flatten(1).max(1)
        m, k = where // NEIGHBOURS, where % NEIGHBOURS
        row = torch.arange(len(t), device=t.device)
        probability = t.square().sum(1) / along[row, m, k].clamp(min=1e-30)
        is_moved = (best > 0) & (noise[part] < probability)
        row, m, k = row[is_moved], m[is_moved], k[is_moved]
        entry = entries[m, chosen[row, m], k]
        codes[part][row, m] = wrapped_codes(entry, size, codes.dtype)
