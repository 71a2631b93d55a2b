"""What the benchmarks of CPU kernels share: settings that libraries read at import, clocks, and limits."""

import argparse
import os
import random
import sys
import time
from collections.abc import Callable

import torch

from quantlayers_kernels import native

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
WITHOUT_AVX512 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c",
}
BANDWIDTH_BYTES = 1 << 28
# A square product: so large that reading its operands takes a negligible time.
PRODUCT_WIDTH = 2048

Clock = Callable[[], float]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--one-thread", action="store_true", help="one thread, and its CPU time: on a shared machine")
    parser.add_argument("--avx2", action="store_true", help="leave AVX-512 unused")


def settle(args: argparse.Namespace) -> None:
    """Restart the process if its libraries were imported with other settings than those of ``args``."""
    settings = (ONE_THREAD if args.one_thread else {}) | (WITHOUT_AVX512 if args.avx2 else {})
    if not settings.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)
    if args.avx2:
        best = min(native.variant(), native.VARIANTS.index("avx2"))
        native.variant = lambda: best


def begin(args: argparse.Namespace) -> tuple[Clock, str]:
    """:func:`settle`, the same random numbers in every run, and :func:`clock_of`."""
    settle(args)
    torch.manual_seed(0)
    random.seed(0)
    return clock_of(args)


def ending(args: argparse.Namespace) -> str:
    """What the name of a result file ends with; none for one thread with the best instructions of the CPU."""
    return ("" if args.one_thread else "_threads") + ("_avx2" if args.avx2 else "")


def clock_of(args: argparse.Namespace) -> tuple[Clock, str]:
    """The clock, and its name in the result file."""
    return (time.process_time, "CPU time") if args.one_thread else (time.perf_counter, "wall clock")


def kernels_in_use() -> str:
    return native.VARIANTS[native.variant()] if native.is_available() else "plain torch"


def _best_seconds(call: Callable[[], object], repeats: int, clock: Clock) -> float:
    seconds = []
    for _ in range(repeats):
        start = clock()
        call()
        seconds.append(clock() - start)
    return min(seconds)


def memory_bandwidth(repeats: int, clock: Clock) -> float:
    """Bytes per second that reading a float32 tensor far larger than any cache reaches."""
    memory = torch.ones(BANDWIDTH_BYTES // 4)
    return BANDWIDTH_BYTES / _best_seconds(memory.sum, repeats, clock)


def operations_per_second(dtype: torch.dtype, repeats: int, clock: Clock) -> float:
    """Multiplications and additions, each counted, that torch's product of two square matrices reaches."""
    left, right = (torch.randn(PRODUCT_WIDTH, PRODUCT_WIDTH, dtype=dtype) for _ in range(2))
    return 2 * PRODUCT_WIDTH**3 / _best_seconds(lambda: left @ right, repeats, clock)
