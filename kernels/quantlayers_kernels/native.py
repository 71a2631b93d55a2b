"""The compiled CPU kernels of ``csrc/``: finding, loading and calling them.

They are optional. Where they were not built, or are switched off with ``QUANTLAYERS_NO_EXTENSION=1`` in the
environment, :func:`is_available` is False and everything runs in plain torch, with the same results up to
float32 rounding. What the kernels compute, and when to use them, is said in each method's ``cpu.py``.
"""

import ctypes
import importlib.util
import logging
import os
from functools import cache

import torch

logger = logging.getLogger(__name__)

SWITCH = "QUANTLAYERS_NO_EXTENSION"
# What csrc/exports.c says; another number is a library that was built from other sources.
INTERFACE_VERSION = 9
VARIANTS = ("baseline", "avx2", "avx512")
# The floating dtypes that the kernels read, by their number in csrc/quantlayers.h.
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Those of dense rows that they write; any other one is cast from float32.
WRITTEN = (torch.float32, torch.bfloat16)

# Parameters of each function: pointers, then 64-bit integers, then C integers, the last two of which
# (threads, variant) come from :func:`call`.
SIGNATURES = {
    "ql_hqq_linear": (6, 5, 4),
    "ql_hqq_dequantize": (4, 5, 6),
    "ql_hqq_gradient": (6, 5, 4),
    "ql_aqlm_linear": (6, 7, 5),
    "ql_aqlm_dequantize": (4, 7, 6),
    "ql_aqlm_update": (6, 5, 3),
    "ql_aqlm_choose": (7, 8, 2),
    "ql_hqq_offsets": (8, 3, 3),
    "ql_hqq_lines": (7, 3, 3),
    "ql_hqq_choose": (5, 3, 3),
}


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where there is none or it is switched off. Looked for once."""
    if os.environ.get(SWITCH, "") not in ("", "0"):
        return None
    spec = importlib.util.find_spec(f"{__package__}._native")
    if spec is None or spec.origin is None:
        return None
    try:
        loaded = ctypes.CDLL(spec.origin)
        version = loaded.ql_interface_version()
    except (OSError, AttributeError) as error:
        logger.warning(
            "%s does not load (%s): CPU kernels run in plain torch. Reinstall to build it.", spec.origin, error
        )
        return None
    if version != INTERFACE_VERSION:
        logger.warning(
            "%s was built from other sources (interface %d, not %d): CPU kernels run in plain torch. Reinstall to "
            "build it anew.",
            spec.origin,
            version,
            INTERFACE_VERSION,
        )
        return None
    for name, (n_pointers, n_int64, n_int) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes = [ctypes.c_void_p] * n_pointers + [ctypes.c_int64] * n_int64 + [ctypes.c_int] * n_int
        function.restype = ctypes.c_int
    loaded.ql_set_parallel_region.argtypes = [ctypes.c_void_p]
    loaded.ql_set_parallel_region.restype = None
    loaded.ql_set_parallel_region(_parallel_region())
    return loaded


def _parallel_region() -> int | None:
    """Address of the OpenMP entry point that torch runs its own threads with; None where torch has another kind."""
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if os.name == "posix" else None
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


def is_available() -> bool:
    """Whether the compiled kernels can be called."""
    return library() is not None


@cache
def variant() -> int:
    """Index in ``VARIANTS`` of the best instruction set that this CPU and the library have."""
    loaded = library()
    return 0 if loaded is None else loaded.ql_best_variant()


def call(name: str, *arguments: int | None) -> None:
    """Run one kernel on as many threads as torch uses; other Python threads go on meanwhile.

    Args:
        name: one of ``SIGNATURES``.
        arguments: addresses (None for a null pointer) and integers, without threads and variant.

    Raises:
        MemoryError: there was no memory for the kernel's scratch space.
    """
    if getattr(library(), name)(*arguments, torch.get_num_threads(), variant()) != 0:
        raise MemoryError(f"{name}: no memory for one block of dense rows. Free some, or set {SWITCH}=1.")
