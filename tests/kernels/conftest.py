"""Which implementation of the CPU kernels a test runs: each instruction set of the compiled ones, or plain torch."""

import pytest

from quantlayers_kernels import native

COMPILED = list(native.VARIANTS)
PLAIN = "plain torch"
# What a user of this machine gets, and what one without a compiler gets.
FASTEST_AND_PLAIN = [native.VARIANTS[native.variant()], PLAIN]


@pytest.fixture
def kernels(request, monkeypatch) -> str:
    """Runs the test with the implementation that its parameter names, one of ``COMPILED`` or ``PLAIN``."""
    if request.param == PLAIN:
        monkeypatch.setattr(native, "library", lambda: None)
    elif not native.is_available():
        pytest.skip("the compiled kernels were not built")
    elif native.VARIANTS.index(request.param) > native.variant():
        pytest.skip(f"this CPU has no {request.param}")
    else:
        monkeypatch.setattr(native, "variant", lambda: native.VARIANTS.index(request.param))
    return request.param
