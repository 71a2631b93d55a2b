"""Give memory that the process has freed back to the system, and ask how much it had at most."""

import ctypes
import sys
from collections.abc import Callable
from functools import cache

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def return_free_memory() -> None:
    """Have the C library return what it keeps of freed memory; where it cannot, do nothing.

    glibc keeps freed blocks of up to 32 MB for later ones. Small objects that stay come to lie between them, so that a
    model that is made and dropped part by part would hold its whole size in the end.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


def return_large_blocks(n_bytes: int = 2**24) -> None:
    """From now on the C library returns each block of ``n_bytes`` or more when it is freed; elsewhere do nothing.

    Of its own accord it does so for the first of a size, and then keeps blocks of up to 32 MB: steps of training, with
    activations of many sizes, come to hold more and more beside what is in use. Smaller blocks stay with it, since the
    system fills each one that it gives with zeros: from 1 MB on, a step on SmolLM2 would take a quarter longer.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, n_bytes)


def peak_resident_bytes() -> int | None:
    """The most memory that this process had so far; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    in_units = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return in_units if sys.platform == "darwin" else 1024 * in_units


@cache
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
