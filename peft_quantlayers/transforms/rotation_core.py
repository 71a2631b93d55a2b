"""Orthogonal matrices for rotations, float64. Numbers in, matrices out; no model."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlayers_kernels.hadamard import hadamard


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix (size, size), float64, uniformly at random."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def rotation_matrix(size: int, *, use_hadamard: bool, keeps_mean: bool, seed: int) -> Tensor:
    """An orthogonal matrix ``R`` (size, size), float64, that spreads each channel over all.

    Args:
        size: number of channels.
        use_hadamard: a Hadamard matrix whose inputs have random signs, so that inputs of one sign are spread too,
            where the size has one; else uniformly at random.
        keeps_mean: ``R @ ones == ones``, so that ``x @ R`` has the mean of ``x``: what LayerNorm commutes with.
        seed: of the random signs or entries.
    """
    generator = torch.Generator().manual_seed(seed)
    basis = hadamard(size) if use_hadamard else None
    if basis is None:
        if not keeps_mean:
            return random_orthogonal(size, generator)
        first = torch.randn(size, size, dtype=torch.float64, generator=generator)
        first[:, 0] = 1
        basis = torch.linalg.qr(first)[0]  # its first column is constant
        inner = torch.eye(size, dtype=torch.float64)
        inner[1:, 1:] = random_orthogonal(size - 1, generator)
        return basis @ inner @ basis.t()
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    if not keeps_mean:
        return signs[:, None] * basis / size**0.5
    basis = basis * basis[0]  # its first row is of ones, and the others sum to zero
    signs[0] = 1
    return basis.t() @ (signs[:, None] * basis) / size
