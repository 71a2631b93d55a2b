"""Orthogonal matrices for rotations, float64. Numbers in, matrices out; no model."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(size: int) -> Tensor | None:
    """A Hadamard matrix (size, size) of entries 1 and -1, float64; None where none of the constructions gives one.

    Sylvester's doubling of Paley's two constructions over prime fields. That covers 2 ** k, and 12, 20, 24, 28, 36,
    44, 60, ... times 2 ** k: the widths of most models (576 = 144 * 4, 960 = 60 * 16, 3072 = 12 * 256).
    """
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if size < 1 or size % 4:
        return None
    if _is_prime(size - 1):  # size - 1 is 3 modulo 4
        return _paley_first(size - 1)
    if (size // 2 - 1) % 4 == 1 and _is_prime(size // 2 - 1):
        return _paley_second(size // 2 - 1)
    half = hadamard(size // 2)
    doubled = hadamard(2)
    return None if half is None or doubled is None else torch.kron(doubled, half)


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix (size, size), float64, uniformly at random."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def rotation_matrix(size: int, *, use_hadamard: bool, keeps_mean: bool, seed: int) -> Tensor:
    """An orthogonal matrix ``R`` (size, size), float64, that spreads each channel over all.

    Args:
        size: number of channels.
        use_hadamard: a Hadamard matrix with random signs, where the size has one; else uniformly at random.
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
        return basis * signs / size**0.5
    basis = basis * basis[0]  # its first row is of ones, and the others sum to zero
    signs[0] = 1
    return basis.t() @ (signs[:, None] * basis) / size


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _jacobsthal(prime: int) -> Tensor:
    """(prime, prime): 1 where i - j is a square modulo the prime, -1 where it is none, 0 on the diagonal."""
    residues = torch.full((prime,), -1.0, dtype=torch.float64)
    residues[torch.arange(1, prime).square() % prime] = 1
    residues[0] = 0
    place = torch.arange(prime)
    return residues[(place[:, None] - place) % prime]


def _bordered(inner: Tensor, column: float) -> Tensor:
    """``inner`` with a first row of ones, a first column of ``column``, and a zero in the corner."""
    size = len(inner) + 1
    result = inner.new_zeros(size, size)
    result[0, 1:], result[1:, 0], result[1:, 1:] = 1, column, inner
    return result


def _paley_first(prime: int) -> Tensor:
    return torch.eye(prime + 1, dtype=torch.float64) + _bordered(_jacobsthal(prime), -1)


def _paley_second(prime: int) -> Tensor:
    conference = _bordered(_jacobsthal(prime), 1)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, plus) + torch.kron(torch.eye(prime + 1, dtype=torch.float64), minus)
