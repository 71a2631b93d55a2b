"""Which floating dtype a product is computed in: what the hardware has units for."""

import torch


def _is_supported(name: str) -> bool:
    query = getattr(torch.ops.mkldnn, name, None)
    return query is not None and bool(query())


# A table, not a cached function: torch.compile reads it as a constant.
_CPU_UNITS = {
    torch.bfloat16: _is_supported("_is_mkldnn_bf16_supported"),
    torch.float16: _is_supported("_is_mkldnn_fp16_supported"),
}


def _has_cpu_units(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a half precision in hardware (AVX512-BF16, AMX, ARM's BF16, ...)."""
    return _CPU_UNITS[dtype]


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute a matrix product in, for operands of ``dtype`` on ``device``.

    ``dtype`` itself, except for a half precision on a CPU that has no units for it: there such a product is
    emulated, up to 90 times slower, and float32 takes its place.
    """
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not _has_cpu_units(dtype):
        return torch.float32
    return dtype
