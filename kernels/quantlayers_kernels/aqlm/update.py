"""Add a small delta to AQLM codes without data: codebooks and scales stay.

An adapter's delta is far smaller than the distance between codebook entries, so that choosing the nearest entries
again would change nothing. Here each group may move to another entry of one codebook, with a probability that retains
the delta on average: ``|t|**2 / <t, v>`` for the delta ``t`` and the entry's step ``v``. Of the steps that reach as
far as the delta, the one with the least ``|v|**2 / <t, v>`` is taken; if none does, the one that reaches farthest.
Which groups move is fixed by a hash of their position. Only the nearest entries are tried.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import native
from ..dither import white_noise
from ..interface import AQLMUpdate
from ..tiled import rows_per_tile
from .cpu import can_dequantize
from .reference import wrapped_codes

# Nearest entries to try: the best step is a short one. A multiple of the widest vector.
NEIGHBOURS = 32
# A codebook of more entries is searched cell by cell, the CANDIDATES in the cells around each entry's own.
MAX_WHOLE_SEARCH = 4096
CANDIDATES = 4096
CELL_SIZE = 256
# Numbers in a buffer of distances, or of steps: 64 MiB of float32.
MAX_BUFFER = 1 << 24


def updated_codes(codes: Tensor, codebooks: Tensor, scales: Tensor, delta: Callable[[slice], Tensor]) -> Tensor:
    """New codes for a weight to which ``delta`` is added; where it is zero the codes stay.

    Args:
        codes: (out_features / og, in_features / ig, num_codebooks), int8 or int16. Not modified.
        codebooks: (num_codebooks, size, og, ig), floating.
        scales: (out_features / og, 1, 1, 1), floating, not zero.
        delta: gives the delta of a range of rows, (n, in_features), float32.
    """
    num_codebooks, size, out_group, in_group = codebooks.shape
    n_out, n_in, _ = codes.shape
    entries = nearest_entries(codebooks)
    steps, per_energy = _steps(codebooks.float().flatten(2), entries)
    moved = codes.contiguous().clone()
    noise = white_noise(n_out * n_in, codes.device)
    is_compiled = can_dequantize(codes, codebooks, scales)
    at_a_time = rows_per_tile(n_out * out_group, n_in * in_group, codes.device, multiple=out_group) // out_group
    for start in range(0, n_out, at_a_time):
        part = slice(start, min(start + at_a_time, n_out))
        rows = delta(slice(part.start * out_group, part.stop * out_group))
        groups = rows.view(-1, out_group, n_in, in_group).transpose(1, 2) / scales[part].float()
        groups = groups.reshape(-1, out_group * in_group)
        here = moved[part].view(-1, num_codebooks)
        there = noise[part.start * n_in : part.stop * n_in]
        if is_compiled:
            update = AQLMUpdate(
                codes=here.data_ptr(),
                delta=groups.data_ptr(),
                steps=steps.data_ptr(),
                per_energy=per_energy.data_ptr(),
                entries=entries.data_ptr(),
                noise=there.data_ptr(),
                n_groups=len(here),
                num_codebooks=num_codebooks,
                size=size,
                d=groups.shape[1],
                neighbours=steps.shape[-1],
                code_bytes=codes.element_size(),
            )
            native.call("ql_aqlm_update", update)
        else:
            _move(here, groups, steps, per_energy, entries, there)
    return moved


def nearest_entries(codebooks: Tensor) -> Tensor:
    """The entries nearest to each one, itself among them, (num_codebooks, size, NEIGHBOURS), int32.

    If ``codebooks`` (num_codebooks, size, og, ig) have fewer entries, the entry itself fills the rest. The search in
    large codebooks is approximate.
    """
    num_codebooks, size = codebooks.shape[:2]
    n = min(NEIGHBOURS, size)
    itself = torch.arange(size, dtype=torch.int32, device=codebooks.device)
    nearest = itself[:, None].expand(num_codebooks, size, NEIGHBOURS).clone()
    for m, codebook in enumerate(codebooks.float().flatten(2)):
        for entries, candidates in _searches(codebook):
            order = torch.cdist(codebook[entries], codebook[candidates]).topk(n, largest=False).indices
            nearest[m, entries, :n] = candidates[order].int()
    return nearest


def _searches(codebook: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Entries and those among which their neighbours are searched, for ``codebook`` (size, d)."""
    size, device = len(codebook), codebook.device
    if size <= MAX_WHOLE_SEARCH:
        everything = torch.arange(size, device=device)
        for entries in everything.split(max(1, MAX_BUFFER // size)):
            yield entries, everything
        return
    centres = codebook[::CELL_SIZE].clone()
    for _ in range(3):
        cell = torch.cat([torch.cdist(part, centres).argmin(1) for part in codebook.split(MAX_BUFFER // len(centres))])
        counts = torch.bincount(cell, minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, cell, codebook)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    members = torch.argsort(cell, stable=True).split(counts.tolist())
    around = torch.cdist(centres, centres).argsort(1)
    reach = (counts[around].cumsum(1) < CANDIDATES).sum(1) + 1
    for entries, cells, n_cells in zip(members, around.tolist(), reach.tolist(), strict=True):
        candidates = torch.cat([members[other] for other in cells[:n_cells]])
        for part in entries.split(max(1, MAX_BUFFER // len(candidates))):
            yield part, candidates


def _steps(codebooks: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """The steps from each entry of ``codebooks`` (num_codebooks, size, d), float32, to its neighbours ``entries``.

    Returns:
        The steps (num_codebooks, size, d, n); and ``1 / |step|**2``, 0 if there is no step, (num_codebooks, size, n).
    """
    num_codebooks, size, d = codebooks.shape
    steps = codebooks.new_empty(num_codebooks, size, d, entries.shape[2])
    per_energy = codebooks.new_empty(num_codebooks, size, entries.shape[2])
    for m, codebook in enumerate(codebooks):
        for part in torch.arange(size, device=codebooks.device).split(max(1, MAX_BUFFER // (d * NEIGHBOURS))):
            step = codebook[entries[m, part].long()] - codebook[part, None]
            energy = step.square().sum(2)
            steps[m, part] = step.transpose(1, 2)
            per_energy[m, part] = torch.where(energy > 0, 1 / energy.clamp(min=1e-30), 0.0)
    return steps, per_energy


def _move(codes: Tensor, delta: Tensor, steps: Tensor, per_energy: Tensor, entries: Tensor, noise: Tensor) -> None:
    """Move ``codes`` (n, num_codebooks) in place, for deltas (n, d) in codebook units and noise (n,)."""
    num_codebooks, size, d, _ = steps.shape
    at_a_time = max(1, MAX_BUFFER // (d * NEIGHBOURS))
    for start in range(0, len(codes), at_a_time):
        part = slice(start, start + at_a_time)
        t = delta[part]
        chosen = codes[part].long() % size
        along = torch.stack([(t[:, None] @ steps[m][chosen[:, m]])[:, 0] for m in range(num_codebooks)], dim=1)
        gain = along * torch.stack([per_energy[m][chosen[:, m]] for m in range(num_codebooks)], dim=1)
        energy = t.square().sum(1)
        reaches = along >= energy[:, None, None]
        # A step that does not reach as far as the delta ranks below any that does, by how far it reaches.
        worth = torch.where(reaches, gain, along - energy[:, None, None])
        where = worth.flatten(1).argmax(1)
        m, k = where // NEIGHBOURS, where % NEIGHBOURS
        row = torch.arange(len(t), device=t.device)
        best = along[row, m, k]
        is_moved = (best > 0) & (noise[part] < energy / best.clamp(min=1e-30))
        row, m, k = row[is_moved], m[is_moved], k[is_moved]
        entry = entries[m, chosen[row, m], k]
        codes[part][row, m] = wrapped_codes(entry, size, codes.dtype)
