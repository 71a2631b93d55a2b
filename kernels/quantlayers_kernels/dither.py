"""Pseudorandom numbers that depend on their position alone: the same on every machine and in every run."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def white_noise(n: int, device: torch.device) -> Tensor:
    """(n,), float32, uniform in (0, 1), white: an integer hash of 1 to n (that of 0 is 0)."""
    position = torch.arange(1, n + 1, dtype=torch.int64, device="cpu")
    for _ in range(2):
        position = ((position ^ (position >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    position ^= position >> 16
    return ((position.double() + 0.5) / 2.0**32).float().to(device)
