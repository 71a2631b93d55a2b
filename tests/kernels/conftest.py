"""Which implementation of the kernels a test runs: a compiled one, by instruction set, Triton's, or plain torch."""

import os

import pytest
from implementations import COMPILED, PLAIN, run_with

from quantlayers_kernels import gpu, gpu_probe, native

__all__ = ["COMPILED", "FASTEST_AND_PLAIN", "PLAIN"]

# What a user of this machine gets, and what one without a compiler gets.
FASTEST_AND_PLAIN = [native.VARIANTS[native.variant()], PLAIN]

# Triton decides when it is imported whether kernels are compiled or interpreted, so these have a process of their own:
# test_triton.py starts it.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


@pytest.fixture
def kernels(request, monkeypatch) -> str:
    """Runs the test with the implementation that its parameter names, one of ``COMPILED`` or ``PLAIN``."""
    run_with(request.param, monkeypatch)
    return request.param


@pytest.fixture
def triton_on_cpu(monkeypatch) -> None:
    """Takes tensors on the CPU for ones on a GPU of 132 multiprocessors."""
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(gpu, "DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(gpu, "n_processors", lambda device: 132)
    if os.environ.get("TRITON_INTERPRET") != "1":  # launches are recorded only
        monkeypatch.setattr(gpu_probe, "can_launch", lambda device: True)
