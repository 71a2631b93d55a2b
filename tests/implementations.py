"""The implementations of the kernels that tests run: the compiled ones, by instruction set, and plain torch."""

import pytest

from quantlayers_kernels import native

COMPILED = list(native.VARIANTS)
PLAIN = "plain torch"


def run_with(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test run with one of ``COMPILED`` or ``PLAIN``; it is skipped where there is no such one."""
    if implementation == PLAIN:
        monkeypatch.setattr(native, "library", lambda: None)
    elif not native.is_available():
        pytest.skip("the compiled kernels were not built")
    elif native.VARIANTS.index(implementation) > native.variant():
        pytest.skip(f"this CPU has no {implementation}")
    else:
        monkeypatch.setattr(native, "variant", lambda: native.VARIANTS.index(implementation))
