"""Which floating dtype a product is computed in: what the hardware has units for."""

from functools import cache

import torch


@cache
def _has_cpu_units(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a half precision in hardware (AVX512-BF16, AMX, ARM's BF16, ...)."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    is_supported = getattr(torch.ops.mkldnn, name, None)
    return is_supported is not None and bool(is_supported())


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute a matrix product in, for operands of ``dtype`` on ``device``.

    ``dtype`` itself, except for a half precision on a CPU that has no units for it: there such a product is
    emulated, up to 90 times slower, and float32 takes its place.
    """
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not _has_cpu_units(dtype):
        return torch.float32
    return dtype
