"""Which implementation of the kernels a test runs: a compiled one, by instruction set, Triton's, or plain torch."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from implementations import COMPILED, PLAIN, run_with

from quantlayers_kernels import gpu, gpu_probe, gpu_tuning, native

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


@pytest.fixture
def in_form(monkeypatch) -> Callable[[Any], AbstractContextManager]:
    """``with in_form(form)``: Triton's kernels run in this form, whatever is the fastest."""

    @contextmanager
    def chosen(form: Any) -> Iterator[None]:
        def fastest(kernel, facts, forms, product, *, like):
            assert form in forms
            return form

        with monkeypatch.context() as patch:
            patch.setattr(gpu_tuning, "fastest", fastest)
            yield

    return chosen
