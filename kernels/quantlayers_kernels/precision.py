"""Which floating dtype a product is computed in: the one that this machine multiplies faster, which is measured."""

import os
import time

import torch
from torch.utils._python_dispatch import _disable_current_modes

CHOICE = "PEFT_QUANTLAYERS_CPU_HALF"
_MEASURE, _HALF, _FLOAT = "auto", "half", "float32"
_CHOSEN = os.environ.get(CHOICE, "").lower() or _MEASURE
# Half precision loses digits, and where it takes as long it gains nothing. Real units take a fifth of the time, and
# others as long as float32 or twice as long, so that noise does not change the answer.
NEEDED_GAIN = 1.25
# Tokens, outputs and inputs of the products that are timed, half a millisecond each in float32.
_TIMED_SIZES = 64, 512, 512
_REPEATS = 5


def _is_supported(name: str) -> bool:
    query = getattr(torch.ops.mkldnn, name, None)
    return query is not None and bool(query())


# Tables, not cached functions: torch.compile reads them as constants.
# What the CPU says of itself. Without such instructions products are emulated, up to 90 times slower. With them they
# may still be slower than in float32: AVX512-BF16 without AMX takes 1.5 to 1.9 times as long.
_CPU_INSTRUCTIONS = {
    torch.bfloat16: _is_supported("_is_mkldnn_bf16_supported"),
    torch.float16: _is_supported("_is_mkldnn_fp16_supported"),
}
_FOUND: dict[torch.dtype, bool] = {}


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute a matrix product in, for operands of ``dtype`` on ``device``.

    ``dtype`` itself, except for a half precision that this CPU does not multiply faster than float32, which takes its
    place. That is measured once in a process, which takes some milliseconds. ``PEFT_QUANTLAYERS_CPU_HALF=half`` in the
    environment, or ``=float32``, decides without measuring, for example to get the same bits on two machines.

    Raises:
        ValueError: another value in the environment.
    """
    if device.type == "cpu" and dtype in _CPU_INSTRUCTIONS and not _is_faster_on_cpu(dtype):
        return torch.float32
    return dtype


def is_float32_chosen() -> bool:
    """Whether the environment asks for products in float32 on CPUs."""
    return _CHOSEN == _FLOAT


def _is_faster_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a half precision faster than those of float32."""
    if dtype not in _FOUND:
        if torch.compiler.is_compiling():  # a clock cannot be compiled: the CPU's word, unless a choice was made
            return _CHOSEN == _HALF or (_CHOSEN != _FLOAT and _CPU_INSTRUCTIONS[dtype])
        _FOUND[dtype] = _decided(dtype)
    return _FOUND[dtype]


def _decided(dtype: torch.dtype) -> bool:
    if _CHOSEN not in (_MEASURE, _HALF, _FLOAT):
        raise ValueError(f"{CHOICE}={_CHOSEN!r} is unknown. Choose from {(_MEASURE, _HALF, _FLOAT)}.")
    if _CHOSEN != _MEASURE:
        return _CHOSEN == _HALF
    return _CPU_INSTRUCTIONS[dtype] and _seconds(torch.float32) > NEEDED_GAIN * _seconds(dtype)


@torch.no_grad()
def _seconds(dtype: torch.dtype) -> float:
    """The shortest time of a layer's product and of the product for its input's gradient, by torch, of ``dtype``."""
    tokens, outputs, inputs = _TIMED_SIZES
    # Modes such as a FLOP counter are not to see these products.
    with _disable_current_modes(), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        shapes = (tokens, inputs), (outputs, inputs), (tokens, outputs)
        x, weight, grad = (torch.ones(shape, dtype=dtype, device="cpu") for shape in shapes)
        shortest = float("inf")
        for _ in range(1 + _REPEATS):  # the first call chooses a kernel
            start = time.perf_counter()
            torch.mm(x, weight.t())
            torch.mm(grad, weight)
            shortest = min(shortest, time.perf_counter() - start)
    return shortest
