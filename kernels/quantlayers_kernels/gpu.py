"""The Triton kernels: whether they can be used, and how their work is laid out on a GPU.

They are optional. If Triton is not installed, or they are switched off with ``QUANTLAYERS_NO_TRITON=1`` in the
environment, :func:`is_available` is False and everything runs in plain torch, with the same results up to rounding. So
it does where :mod:`gpu_probe` finds that they cannot run.
What the kernels compute is documented in each method's ``triton_kernels.py``, and when to use them in its ``gpu.py``.
"""

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gpu_probe

SWITCH = "QUANTLAYERS_NO_TRITON"
DEVICE_TYPES = ("cuda",)  # ROCm's GPUs too: torch calls them so

# A product with at most this many tokens decodes the weight into registers; with more, the weight is dequantized to
# memory and multiplied by cuBLAS. TODO: choose it by measurement; waits for the sweep of benchmarks/bench_gpu.py.
MAX_TOKENS = 64
# From here on Triton uses an NVIDIA GPU's tensor cores.
TENSOR_CORES_CAPABILITY = (8, 0)
# Fewest inputs of one step on the tensor cores, and fewest tokens that their tiles are padded to.
MIN_DOT = 16
# Programs per multiprocessor to aim at, by splitting the inputs, if the rows of a weight make fewer.
PROGRAMS_PER_PROCESSOR = 4
MAX_SPLITS = 16
MIN_STEPS_PER_SPLIT = 4
# Tokens of a tile on the tensor cores, and warps of a program. With 64 tokens in four warps its sums would spill out
# of the registers.
MAX_DOT_TOKENS = 64
_WARPS = {16: 4, 32: 4, 64: 8}


@cache
def is_available() -> bool:
    """Whether Triton is installed and not switched off. Looked for once; nothing is imported."""
    return os.environ.get(SWITCH, "") in ("", "0") and importlib.util.find_spec("triton") is not None


def can_hold(*tensors: Tensor) -> bool:
    """Whether the tensors are all on one device, and the kernels run on it and read the floating ones."""
    device = tensors[0].device
    return (
        device.type in DEVICE_TYPES
        and all(tensor.device == device for tensor in tensors)
        and all(gpu_probe.can_read(tensor.dtype, device) for tensor in tensors if tensor.is_floating_point())
        and is_available()
        and gpu_probe.can_launch(device)
    )


def has_tensor_cores(x: Tensor) -> bool:
    """Whether several tokens like ``x`` are multiplied on tensor cores; all else is left to cuBLAS.

    float32, and all dtypes on NVIDIA's GPUs before Ampere, whose tensor cores Triton does not use.
    """
    return x.dtype in (torch.float16, torch.bfloat16) and gpu_probe.capability(x.device) >= TENSOR_CORES_CAPABILITY


def has_little_shared_memory() -> bool:
    """Whether a program may have 64 KiB of shared memory only, as on most of AMD's GPUs, and not 99 KiB or more."""
    return torch.version.hip is not None


@cache
def n_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits(n_programs: int, n_steps: int, device: torch.device) -> int:
    """Number of parts, a power of two, to split the ``n_steps`` over the inputs into: enough programs for a GPU.

    Each part is written separately, and the last program to come adds them up, in a fixed order.
    """
    parts = 1
    wanted = PROGRAMS_PER_PROCESSOR * n_processors(device)
    while parts < MAX_SPLITS and 2 * parts * n_programs <= wanted and n_steps >= 2 * parts * MIN_STEPS_PER_SPLIT:
        parts *= 2
    return parts


class Written(NamedTuple):
    """What a product's kernel writes, and the bias that it adds; see ``parts_kernel.write_product``."""

    bias: Tensor | None
    y: Tensor
    parts: Tensor | None = None
    arrived: Tensor | None = None


def product_in_parts(
    x: Tensor, bias: Tensor | None, out_features: int, *, n_rows: int, n_steps: int, launch: Callable
) -> Tensor:
    """A product (..., out_features), dtype of ``x`` (..., in_features), written by a kernel.

    Args:
        bias: (out_features,) or None.
        n_rows: rows of the weight that belong to one program.
        n_steps: steps that a program takes over the inputs, to be divided among several programs.
        launch: called with the first two sizes of the kernel's grid, what it writes, and the steps of a part.
    """
    n_programs, n_tokens = -(-out_features // n_rows), x.numel() // x.shape[-1]
    n_parts = splits(n_programs, n_steps, x.device)
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
        written = Written(bias, y)
        if n_parts > 1:
            n_tiles = -(-n_tokens // dot_tokens(n_tokens))
            parts = torch.empty(n_parts, y.numel(), dtype=torch.float32, device=x.device)
            arrived = torch.zeros(n_programs * n_tiles, dtype=torch.int32, device=x.device)
            written = Written(bias, y, parts, arrived)
        launch((n_programs, n_parts), written, -(-n_steps // n_parts))
        return y


def dot_tokens(n_tokens: int) -> int:
    """Tokens of a tile on the tensor cores: all of up to ``MAX_DOT_TOKENS``, so that each weight is decoded once."""
    return min(MAX_DOT_TOKENS, max(MIN_DOT, power_of_two(n_tokens)))


def dot_warps(n_tokens: int) -> int:
    """Warps of a program for such a tile, unless another number was measured to be faster."""
    return _WARPS[dot_tokens(n_tokens)]


def power_of_two(at_least: int) -> int:
    """The smallest power of two that is not below."""
    return 1 << (at_least - 1).bit_length()


@cache
def product_type(dtype: torch.dtype) -> Any:
    """Triton's type to multiply matrices of ``dtype`` in.

    Triton's interpreter would read the bits of a bfloat16 as an integer; it gets float32, which holds all operands.
    """
    import triton
    import triton.language as tl

    return tl.float32 if triton.knobs.runtime.interpret else getattr(tl, str(dtype).removeprefix("torch."))
