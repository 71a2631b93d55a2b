"""The compiled CPU kernels of ``csrc/``: finding, loading and calling them.

They are optional. If they were not built, or are switched off with ``PEFT_QUANTLAYERS_CPU=torch`` in the environment
(or ``QUANTLAYERS_NO_EXTENSION=1``), :func:`is_available` is False and everything runs in plain torch. Each kernel's
result is then the same up to float32 rounding; but a caller may choose less work where it would take too long in torch
(AQLM searches with a narrow beam). ``PEFT_QUANTLAYERS_CPU=avx2`` and the other ``VARIANTS`` choose an instruction set,
for example to get the same bits on two machines; the best that the CPU has is the default. What the kernels compute,
and when to use them, is documented in each method's ``cpu.py``; what they are called with, in ``interface.py``.
"""

import ctypes
import importlib.util
import logging
import os
from functools import cache
from typing import NoReturn

import torch

from .interface import FUNCTIONS, IN_FLOAT32, INTERFACE
from .precision import is_float32_chosen

logger = logging.getLogger(__name__)

SWITCH = "QUANTLAYERS_NO_EXTENSION"
CHOICE = "PEFT_QUANTLAYERS_CPU"
VARIANTS = ("baseline", "avx2", "avx512")
_BEST, _NONE = "auto", "torch"
# The floating dtypes that the kernels read, by their number in csrc/quantlayers.h.
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# The dtypes that they write, and that products read and write; others are cast from float32, or to it.
WRITTEN = (torch.float32, torch.bfloat16)


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None if it was not built (a warning says so) or is switched off. Looked for once.

    Raises:
        ValueError: the environment chooses an unknown variant.
    """
    if _chosen() == _NONE:
        return None
    spec = importlib.util.find_spec(f"{__package__}._native")
    if spec is None or spec.origin is None:
        logger.warning(
            "the compiled CPU kernels were not built, so quantized layers run in plain torch on a CPU, several times "
            "slower. Install a C compiler (gcc or clang) and reinstall with pip install --no-cache-dir "
            "--force-reinstall --no-deps peft_quantlayers. To run without them on purpose, set %s=%s.",
            CHOICE,
            _NONE,
        )
        return None
    try:
        loaded = ctypes.CDLL(spec.origin)
        _declare(loaded)
        found = loaded.ql_interface()
    except (OSError, AttributeError) as error:
        logger.warning(
            "%s does not load (%s): CPU kernels run in plain torch. Reinstall to build it.", spec.origin, error
        )
        return None
    if found != INTERFACE:
        logger.warning(
            "%s was built for another interface (%08x, not %08x): CPU kernels run in plain torch. Reinstall to "
            "rebuild it.",
            spec.origin,
            found,
            INTERFACE,
        )
        return None
    loaded.ql_set_parallel_region(_parallel_region())
    return loaded


def _chosen() -> str:
    """The variant that the environment asks for: one of ``VARIANTS``, "auto" or "torch"."""
    if os.environ.get(SWITCH, "") not in ("", "0"):
        return _NONE
    chosen = os.environ.get(CHOICE, "").lower() or _BEST
    if chosen not in (_BEST, _NONE, *VARIANTS):
        raise ValueError(f"{CHOICE}={chosen!r} is unknown. Choose from {(_BEST, _NONE, *VARIANTS)}.")
    return chosen


def _declare(loaded: ctypes.CDLL) -> None:
    """Tell ctypes the argument types of all functions. Raises AttributeError if one is missing."""
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments


def _parallel_region() -> int | None:
    """Address of the OpenMP entry point that torch starts its own threads with; None if torch uses no GOMP."""
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if os.name == "posix" else None
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


def is_available() -> bool:
    """Whether the compiled kernels can be called."""
    return library() is not None


@cache
def variant() -> int:
    """Index in ``VARIANTS`` of the instruction set in use: the best of this CPU, or the one that was chosen."""
    loaded, chosen = library(), _chosen()
    best = 0 if loaded is None else loaded.ql_best_variant()
    if loaded is None or chosen == _BEST:
        return best
    if VARIANTS.index(chosen) > best:
        logger.warning("%s=%s: this CPU has none of it; %s is used.", CHOICE, chosen, VARIANTS[best])
    return min(best, VARIANTS.index(chosen))


def choice() -> int:
    """What kernels are called with: the instruction set, and whether products of bfloat16 are computed in float32."""
    return variant() | (IN_FLOAT32 if is_float32_chosen() else 0)


def has_bfloat16_products() -> bool:
    """Whether products of bfloat16 inputs multiply them as they are, by an extension of the CPU, not in float32."""
    loaded = library()
    return loaded is not None and bool(loaded.ql_has_bfloat16_products(choice()))


@cache
def has_matrix_tiles() -> bool:
    """Whether the kernels that multiply in AMX's tiles can be called: on Linux, with the "avx512" variant."""
    loaded = library()
    return loaded is not None and variant() == VARIANTS.index("avx512") and bool(loaded.ql_has_matrix_tiles())


def call(name: str, *structures: ctypes.Structure) -> None:
    """Run one kernel on as many threads as torch uses; other Python threads go on meanwhile.

    Args:
        name: one of ``interface.KERNELS``.
        structures: the kernel's arguments. The caller keeps the tensors alive whose addresses they hold.

    Raises:
        MemoryError: out of memory for the kernel's scratch.
    """
    if getattr(library(), name)(*structures, torch.get_num_threads(), choice()) != 0:
        refuse_without_memory(name)


def refuse_without_memory(name: str) -> NoReturn:
    raise MemoryError(f"{name}: out of memory for one block of dense rows. Free some, or set {CHOICE}={_NONE}.")
