"""Whether Triton's kernels can run on a GPU: its compute capability, and one small kernel that is built and run there.

On many machines Triton is installed without a compiler or a driver that it can use. Then everything runs in plain
torch, with one warning that says why.
"""

import logging
from functools import cache

import torch

logger = logging.getLogger(__name__)

# The floating dtypes that the kernels read and write.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Triton builds for no older ones.
MIN_CAPABILITY = (7, 0)
# From here on there are instructions for it; before, Triton's kernels of it are not built.
BFLOAT16_CAPABILITY = (8, 0)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU; the newest for AMD's, whose numbers mean something else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return (1000, 0)
    return torch.cuda.get_device_capability(device)


def can_read(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels may read and write ``dtype`` on the device."""
    return dtype in DTYPES and (dtype != torch.bfloat16 or capability(device) >= BFLOAT16_CAPABILITY)


def can_launch(device: torch.device) -> bool:
    """Whether a kernel can be built and run on the device. Tried once for each, and a failure is logged once.

    True while a CUDA graph is recorded, in which nothing can be tried; runs before the recording have.
    """
    is_recorded = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return True if is_recorded else _can_launch(device)


@cache
def _can_launch(device: torch.device) -> bool:
    if capability(device) < MIN_CAPABILITY:
        reason = f"its compute capability is {'.'.join(map(str, capability(device)))}, and Triton needs 7.0"
    else:
        reason = _failure(device)
    if reason:
        logger.warning(
            "quantized layers on %s compute in plain torch, which is slower: %s. QUANTLAYERS_NO_TRITON=1 has the same "
            "effect without this warning.",
            device,
            reason,
        )
    return not reason


def _failure(device: torch.device) -> str:
    """Why a kernel cannot be built and run; empty if it can."""
    try:
        # Triton is imported with the first kernel, and may be broken in ways of its own.
        from .probe_kernel import copy

        source = torch.arange(16, dtype=torch.float32, device=device)
        written = torch.zeros_like(source)
        with torch.cuda.device_of(source):
            copy[(1,)](source, written, N=16)
        return "" if torch.equal(source, written) else "a kernel of Triton ran and wrote something else"
    except Exception as error:  # a compiler's, a driver's or Triton's own
        return f"Triton cannot build or run a kernel there ({type(error).__name__}: {str(error).splitlines()[:1]})"
