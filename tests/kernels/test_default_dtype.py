"""Numbers do not depend on torch's default dtype, which people set to build a model in a half precision."""

from collections.abc import Callable

import pytest
import torch
from conftest import FASTEST_AND_PLAIN
from torch import Tensor

import peft_quantlayers as pql
from peft_quantlayers.methods import get_method
from quantlayers_kernels.aqlm import aqlm_linear
from quantlayers_kernels.bitpack import pack
from quantlayers_kernels.hqq import hqq_linear

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.parametrize("kernels", FASTEST_AND_PLAIN, indirect=True),
]
OUT, IN = 64, 128
WEIGHT = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
INPUTS = torch.randn(200, IN, generator=torch.Generator().manual_seed(1))
HESSIAN = INPUTS.t() @ INPUTS / len(INPUTS) + 0.1 * torch.eye(IN)


def gradients(trained: list[Tensor], linear: Callable[..., Tensor]) -> list[Tensor]:
    leaves = [part.clone().requires_grad_() for part in (INPUTS, *trained)]
    return list(torch.autograd.grad(linear(*leaves), leaves, INPUTS[:, :OUT].contiguous()))


def hqq_product() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    W_q = pack(torch.randint(0, 16, (OUT, IN), generator=generator).byte(), 4)
    trained = [torch.rand(OUT, 2, generator=generator, dtype=torch.float32) + 0.5 for _ in range(2)]
    return gradients(trained, lambda x, scale, zero: hqq_linear(x, W_q, scale, zero, None, 4, 1))


def aqlm_product() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(-128, 128, (OUT, IN // 8, 2), generator=generator, dtype=torch.int8)
    codebooks = torch.randn(2, 256, 1, 8, generator=generator, dtype=torch.float32)
    scales = torch.rand(OUT, 1, 1, 1, generator=generator, dtype=torch.float32)
    return gradients([codebooks, scales], lambda x, *trained: aqlm_linear(x, codes, *trained, None))


def quantized(config: pql.QuantConfig, hessian: Tensor | None) -> list[Tensor]:
    spec = config.spec_for("weight")
    found = get_method(spec.method).quantize(WEIGHT, spec, hessian=hessian)
    return [found.tensors[name] for name in sorted(found.tensors)]


CASES: dict[str, Callable[[], list[Tensor]]] = {
    "hqq product": hqq_product,
    "aqlm product": aqlm_product,
    "hqq": lambda: quantized(pql.HQQConfig(nbits=2), None),
    "hqq calibrated": lambda: quantized(pql.HQQConfig(nbits=3), HESSIAN),
    "aqlm": lambda: quantized(pql.AQLMConfig(nbits_per_codebook=4, rounds=2), None),
    "aqlm calibrated": lambda: quantized(pql.AQLMConfig(nbits_per_codebook=4, rounds=2), HESSIAN),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_default_dtype_changes_no_bit(case, dtype):
    expected = CASES[case]()
    torch.set_default_dtype(dtype)
    try:
        found = CASES[case]()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
