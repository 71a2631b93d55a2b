"""Shared by all tests: one thread each, the same random numbers in every run, and the slow ones first."""

import gc
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from selection import is_slow, is_thorough

from quantlayers_kernels import tiled

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow, and begin with its files: `make test` gives each worker whole files in this order."""
    for item in items:
        if is_slow(item.nodeid):
            item.add_marker("slow")
        if is_thorough(item.nodeid):
            item.add_marker("thorough")
    first = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("real_model")}
    items.sort(key=lambda item: item.path not in first)


def pytest_collection_finish() -> None:
    """Modules and collected tests are here to stay: garbage collection need not look at them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _without_waiting_for_the_disk() -> Iterator[None]:
    """Programs are killed in tests, but no power fails: a file that the system has is there after a kill."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def toy_method(monkeypatch) -> None:
    """The toy method of :mod:`every_method` is registered for the length of a test."""
    from every_method import register_toy  # not above: the kernels' tests need no more than the kernels

    register_toy(monkeypatch)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing is compiled before the test, nor left of it: a function is compiled again a few times at most."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def set_tile_elements(monkeypatch) -> Callable[[int], None]:
    """Makes a CPU's tiles as small as one says, so that a small weight has several."""

    def set_elements(n_elements: int) -> None:
        monkeypatch.setattr(tiled, "CPU_TILE_ELEMENTS", n_elements)
        monkeypatch.setattr(tiled, "CPU_TILE_ROWS", 1)
        monkeypatch.setattr(tiled, "CPU_ROWS_MULTIPLE", 1)

    return set_elements
