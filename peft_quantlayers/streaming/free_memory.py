"""Give memory that the process has freed back to the system."""

import ctypes
import sys
from collections.abc import Callable
from functools import cache


def return_free_memory() -> None:
    """Have the C library return what it keeps of freed memory; where it cannot, do nothing.

    glibc keeps freed blocks of up to 32 MB for later ones. Small objects that stay come to lie between them, so that a
    model that is made and dropped part by part would hold its whole size in the end.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
