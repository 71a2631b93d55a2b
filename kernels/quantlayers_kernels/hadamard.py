"""Hadamard matrices, and rotations by them that take ``n * (p + q)`` products a row of ``n = p * q`` numbers.

A Hadamard matrix has entries 1 and -1 and orthogonal rows; so does the Kronecker product of two of them, whose factors
can be applied one after the other.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .direct_call import can_skip_operator

# Rows are rotated in blocks of p * q neighbouring numbers, with both factors up to this.
MAX_FACTOR = 512
# Smaller blocks spread nothing.
MIN_BLOCK = 4


@torch.library.custom_op("quantlayers::rotate", mutates_args=())
def _rotate(x: Tensor, is_inverse: bool) -> Tensor:
    return _rotated(x, is_inverse)


@_rotate.register_fake
def _(x: Tensor, is_inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
    ctx.is_inverse = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _rotate(grad, not ctx.is_inverse), None  # the inverse of an orthogonal matrix is its transpose


_rotate.register_autograd(_backward, setup_context=_save)


def rotate(x: Tensor) -> Tensor:
    """``x @ Q`` for a fixed orthogonal ``Q`` of random signs and Hadamard matrices, in memory of its own.

    Computed in float32 at least, and differentiable any number of times. A float16 row must have a norm of less than
    65504, or a number of the result may be infinite.

    Args:
        x: (..., n), floating; ``n`` as :func:`rotation_block` takes it.
    """
    return _rotated(x, False) if _can_skip_operator(x) else _rotate(x, False)


def rotate_back(x: Tensor) -> Tensor:
    """The inverse of :func:`rotate`."""
    return _rotated(x, True) if _can_skip_operator(x) else _rotate(x, True)


def _can_skip_operator(x: Tensor) -> bool:
    return can_skip_operator(x) and not x.is_meta


def _rotated(x: Tensor, is_inverse: bool) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return _rotated(x, is_inverse)
    size, dtype = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    p, q = rotation_factors(size)
    by_q, by_p = _scaled_hadamard(q, x.device, dtype), _scaled_hadamard(p, x.device, dtype)
    sign = _signs(size, x.device, dtype)
    if is_inverse:
        rows = (x.to(dtype).reshape(-1, p) @ by_p.t()).view(-1, q, p).transpose(1, 2)
        return ((rows.reshape(-1, q) @ by_q.t()).view(x.shape) * sign).to(x.dtype)
    rows = ((x * sign).reshape(-1, q) @ by_q).view(-1, p, q).transpose(1, 2)
    return (rows.reshape(-1, p) @ by_p).view(x.shape).to(x.dtype)


def rotation_block(size: int) -> int:
    """How many neighbouring numbers of a row of ``size`` are mixed, a divisor of it; 0 where fewer than 4 could be."""
    p, q = rotation_factors(size)
    return p * q if p * q >= MIN_BLOCK else 0


@cache
def rotation_factors(size: int) -> tuple[int, int]:
    """Two sizes of Hadamard matrices whose product divides ``size``: the largest, and those closest to each other."""
    known = [n for n in range(1, min(size, MAX_FACTOR) + 1) if size % n == 0 and hadamard(n) is not None]
    pairs = [(p, q) for p in known for q in known if p <= q and size % (p * q) == 0]
    return max(pairs, key=lambda pair: (pair[0] * pair[1], -pair[1]))


@cache
def _signs(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(size,): 1 or -1 for each place, the same in every version: stored weights depend on them."""
    place = torch.arange(1, size + 1, device=device)
    bits = (place * 0x9E3779B1 & 0xFFFFFFFF) >> 15 & 1  # of Fibonacci hashing
    return (1 - 2 * bits).to(dtype)


@cache
def _scaled_hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """An orthogonal matrix (size, size)."""
    found = hadamard(size)
    assert found is not None
    return (found / size**0.5).to(device, dtype)


def hadamard(size: int) -> Tensor | None:
    """A Hadamard matrix (size, size) of entries 1 and -1, float64; None where none of the constructions gives one.

    Sylvester's doubling of Paley's two constructions over prime fields. That covers 2 ** k, and 12, 20, 24, 28, 36,
    44, 60, ... times 2 ** k: the widths of most models (576 = 144 * 4, 960 = 60 * 16, 3072 = 12 * 256).
    """
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64, device="cpu")
    if size == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
    if size < 1 or size % 4:
        return None
    if _is_prime(size - 1):  # size - 1 is 3 modulo 4
        return _paley_first(size - 1)
    if (size // 2 - 1) % 4 == 1 and _is_prime(size // 2 - 1):
        return _paley_second(size // 2 - 1)
    half = hadamard(size // 2)
    doubled = hadamard(2)
    return None if half is None or doubled is None else torch.kron(doubled, half)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _jacobsthal(prime: int) -> Tensor:
    """(prime, prime): 1 where i - j is a square modulo the prime, -1 where it is none, 0 on the diagonal."""
    residues = torch.full((prime,), -1.0, dtype=torch.float64, device="cpu")
    residues[torch.arange(1, prime, device="cpu").square() % prime] = 1
    residues[0] = 0
    place = torch.arange(prime, device="cpu")
    return residues[(place[:, None] - place) % prime]


def _bordered(inner: Tensor, column: float) -> Tensor:
    """``inner`` with a first row of ones, a first column of ``column``, and a zero in the corner."""
    size = len(inner) + 1
    result = inner.new_zeros(size, size)
    result[0, 1:], result[1:, 0], result[1:, 1:] = 1, column, inner
    return result


def _paley_first(prime: int) -> Tensor:
    return torch.eye(prime + 1, dtype=torch.float64, device="cpu") + _bordered(_jacobsthal(prime), -1)


def _paley_second(prime: int) -> Tensor:
    conference = _bordered(_jacobsthal(prime), 1)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64, device="cpu")
    return torch.kron(conference, plus) + torch.kron(torch.eye(prime + 1, dtype=torch.float64, device="cpu"), minus)
