"""Add a change to AQLM codes without data: pure arithmetic in float32 on one matrix of vectors.

An adapter's change is far smaller than the distance between codebook entries, so that coding anew changes nothing.
Here each vector may take another entry from one codebook, and does so with a probability that makes the change right
on average: the entry whose step ``v`` is shortest for what it brings along the change ``t``, with probability
``|t|**2 / <t, v>``. Which vectors move is fixed by a hash of their position.
"""

import torch
from torch import Tensor

from quantlayers_kernels.dither import white_noise

# Vectors that are compared with a codebook at a time: three buffers of 2**22 float32 are 48 MiB.
MAX_PAIRS = 1 << 22


def dithered_codes(change: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    """Codes whose sum of entries has moved by ``change`` on average; no change leaves a vector's codes as they are.

    Args:
        change: (n, d), float32, in codebook units.
        codes: (n, num_codebooks), int64.
        codebooks: (num_codebooks, size, d), float32.
    """
    n = len(codes)
    moved = codes.clone()
    noise = white_noise(n, codes.device)
    step = max(1, MAX_PAIRS // codebooks.shape[1])
    for start in range(0, n, step):
        part = slice(start, start + step)
        gain, entry, codebook = _best_steps(change[part], codes[part], codebooks)
        # gain is <t, v> / |v|**2 of the best step; along t it brings <t, v>.
        index = torch.arange(len(gain), device=codes.device)
        target = moved[part]
        v = codebooks[codebook, entry] - codebooks[codebook, target[index, codebook]]
        along = (change[part] * v).sum(1)
        probability = change[part].square().sum(1) / along.clamp(min=1e-30)
        moves = (along > 0) & (noise[part] < probability)
        target[index[moves], codebook[moves]] = entry[moves]
    return moved


def _best_steps(change: Tensor, codes: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gain ``<t, v> / |v|**2`` of the best step ``v``, its entry and its codebook; each (n,)."""
    best = change.new_zeros(len(change))
    entry, which = torch.zeros_like(codes[:, 0]), torch.zeros_like(codes[:, 0])
    for m, codebook in enumerate(codebooks):
        chosen = codes[:, m]
        distance = torch.cdist(codebook, codebook).square_()[chosen]  # (n, size)
        along = change @ codebook.t()
        along -= along.gather(1, chosen[:, None])
        gain, candidate = along.div_(distance.clamp_(min=1e-12)).max(dim=1)
        is_better = gain > best
        best = torch.where(is_better, gain, best)
        entry, which = torch.where(is_better, candidate, entry), torch.where(is_better, m, which)
    return best, entry, which
