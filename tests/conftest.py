"""Shared by all tests: one thread each, and the same random numbers in every run."""

import os
from collections.abc import Callable

import pytest
import torch

from quantlayers_kernels import tiled

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def set_tile_elements(monkeypatch) -> Callable[[int], None]:
    """Makes a CPU's tiles as small as one says, so that a small weight has several."""

    def set_elements(n_elements: int) -> None:
        monkeypatch.setattr(tiled, "CPU_TILE_ELEMENTS", n_elements)
        monkeypatch.setattr(tiled, "CPU_TILE_ROWS", 1)
        monkeypatch.setattr(tiled, "CPU_ROWS_MULTIPLE", 1)

    return set_elements
