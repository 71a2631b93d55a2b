"""What rounding to a dtype means in Triton's interpreter, which up to 3.7 truncates to bfloat16."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _copy(source, target):
    tl.store(target, tl.load(source).to(target.dtype.element_ty))


def _truncates() -> bool:
    source, target = torch.tensor([1 + 2**-8 + 2**-9]), torch.zeros(1, dtype=torch.bfloat16)
    _copy[1,](source, target)
    return target.item() == 1


TRUNCATES = _truncates()


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values``, float32, as the interpreter stores them in ``dtype``."""
    if dtype == torch.bfloat16 and TRUNCATES:
        values = (values.view(torch.int32) & -0x10000).view(torch.float32)
    return values.to(dtype)
