"""Linear layers that multiply the same number of weights on a GPU, ours and the peers': what ``bench_gpu.py`` times.

Weights are random, since the time does not depend on them. Each layer comes with its dequantized weight, so that its
product can be checked before it is timed. A peer that is not installed, or fails, is recorded with its error.
"""

from collections.abc import Callable, Iterator

import torch
from _linears import GROUP_SIZE, Candidate
from torch import Tensor, nn
from torch.nn.functional import linear

from quantlayers_kernels.aqlm import aqlm_linear
from quantlayers_kernels.aqlm.reference import dequantize_aqlm_reference
from quantlayers_kernels.bitpack import pack
from quantlayers_kernels.hqq import hqq_linear
from quantlayers_kernels.hqq.reference import dequantize_hqq_reference

# Relative error of products in half precision, with a margin for peers that also round the weight.
TOLERANCE = 1e-2


def hqq_tensors(out_features: int, in_features: int, nbits: int, device: str) -> tuple[Tensor, ...]:
    codes = torch.randint(0, 2**nbits, (out_features, in_features), dtype=torch.uint8, device=device)
    scale = 0.01 + 0.01 * torch.rand(out_features, in_features // GROUP_SIZE, device=device)
    zero = (2**nbits - 1) * torch.rand(scale.shape, device=device)
    return pack(codes, nbits), scale.half(), zero.half()


def aqlm_tensors(
    out_features: int, in_features: int, num_codebooks: int, nbits: int, device: str
) -> tuple[Tensor, ...]:
    code_type = torch.int8 if nbits == 8 else torch.int16
    limits = torch.iinfo(code_type)
    shape = (out_features, in_features // 8, num_codebooks)
    codes = torch.randint(limits.min, limits.max + 1, shape, device=device, dtype=code_type)
    codebooks = torch.randn(num_codebooks, 2**nbits, 1, 8, device=device).half()
    return codes, codebooks, (0.01 + 0.01 * torch.rand(out_features, 1, 1, 1, device=device)).half()


def _nbytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(part.nbytes for part in tensors)


def ours(out_features: int, in_features: int, device: str) -> Iterator[tuple[str, Candidate]]:
    """The dense layer first, then our quantized ones, float16."""
    dense = (torch.randn(out_features, in_features, device=device) / 50).half()
    yield (
        "dense float16",
        Candidate(multiply=lambda x: linear(x, dense), weight=dense, nbytes=dense.nbytes, is_ours=True),
    )
    for nbits in (4, 3, 2, 8):
        yield f"HQQ {nbits}-bit", hqq(hqq_tensors(out_features, in_features, nbits, device), nbits, in_features)
    for name, scheme in {"AQLM 2x8": (2, 8), "AQLM 1x16": (1, 16)}.items():
        yield name, aqlm(aqlm_tensors(out_features, in_features, *scheme, device))


def hqq(tensors: tuple[Tensor, ...], nbits: int, in_features: int) -> Candidate:
    return Candidate(
        multiply=lambda x: hqq_linear(x, *tensors, None, nbits, 1),
        weight=dequantize_hqq_reference(*tensors, nbits=nbits, axis=1, in_features=in_features),
        nbytes=_nbytes(tensors),
        is_ours=True,
        tolerance=TOLERANCE,
    )


def aqlm(tensors: tuple[Tensor, ...]) -> Candidate:
    return Candidate(
        multiply=lambda x: aqlm_linear(x, *tensors, None),
        weight=dequantize_aqlm_reference(*tensors),
        nbytes=_nbytes(tensors),
        is_ours=True,
        tolerance=TOLERANCE,
    )


def _nf4(out_features: int, in_features: int, device: str) -> Candidate:
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    dense = (torch.randn(out_features, in_features, device=device) / 50).half()
    codes, state = quantize_4bit(dense, quant_type="nf4", blocksize=GROUP_SIZE)
    return Candidate(
        multiply=lambda x: bnb.matmul_4bit(x, codes.t(), quant_state=state),
        weight=dequantize_4bit(codes, state),
        nbytes=codes.nbytes + state.absmax.nbytes,
        tolerance=TOLERANCE,
    )


def _tinygemm(out_features: int, in_features: int, device: str) -> Candidate:
    """torch's own 4-bit product; bfloat16, ``(code - 8) * scale + zero``."""
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8, device=device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    shape = (in_features // GROUP_SIZE, out_features, 2)
    scale_and_zero = (0.01 + 0.01 * torch.rand(shape, device=device)).bfloat16()
    scale, zero = scale_and_zero.float().repeat_interleave(GROUP_SIZE, 0).unbind(-1)
    return Candidate(
        multiply=lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP_SIZE, scale_and_zero),
        weight=(codes.float() - 8) * scale.t() + zero.t(),
        nbytes=packed.nbytes + scale_and_zero.nbytes,
        tolerance=3e-2,
    )


def _gemlite(out_features: int, in_features: int, device: str) -> Candidate:
    from gemlite.core import DType, GemLiteLinearTriton

    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8, device=device)
    scale = (0.01 + 0.01 * torch.rand(out_features, in_features // GROUP_SIZE, device=device)).half()
    zero = (15 * torch.rand(scale.shape, device=device)).half()
    layer = GemLiteLinearTriton(
        4,
        group_size=GROUP_SIZE,
        in_features=in_features,
        out_features=out_features,
        input_dtype=DType.FP16,
        output_dtype=DType.FP16,
    )
    layer.pack(codes, scale.view(-1, 1), zero.view(-1, 1), None)
    dense = (codes.float().view(*scale.shape, -1) - zero.float().unsqueeze(-1)) * scale.float().unsqueeze(-1)
    nbytes = codes.nbytes // 2 + scale.nbytes + zero.nbytes
    return Candidate(multiply=layer, weight=dense.view(codes.shape), nbytes=nbytes, tolerance=TOLERANCE)


def _hqq_package(out_features: int, in_features: int, device: str) -> Candidate:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=GROUP_SIZE, axis=1)
    config["weight_quant_params"]["optimize"] = False  # the weight's quality is not measured here
    dense = nn.Linear(in_features, out_features, bias=False)
    layer = HQQLinear(dense, config, compute_dtype=torch.float16, device=device)
    nbytes = layer.W_q.nbytes + layer.meta["scale"].nbytes + layer.meta["zero"].nbytes
    return Candidate(multiply=layer, weight=layer.dequantize().clone(), nbytes=nbytes, tolerance=TOLERANCE)


def _aqlm_package(num_codebooks: int, nbits: int) -> Callable[[int, int, str], Candidate]:
    def make(out_features: int, in_features: int, device: str) -> Candidate:
        from aqlm import QuantizedLinear

        tensors = aqlm_tensors(out_features, in_features, num_codebooks, nbits, device)
        layer = QuantizedLinear(in_features, out_features, 8, 1, num_codebooks, nbits, bias=False)
        for name, tensor in zip(("codes", "codebooks", "scales"), tensors, strict=True):
            getattr(layer, name).data = tensor
        weight = dequantize_aqlm_reference(*tensors)
        return Candidate(multiply=layer, weight=weight, nbytes=_nbytes(tensors), tolerance=TOLERANCE)

    return make


# The dtype of x, and what makes the layer.
PEERS: dict[str, tuple[torch.dtype, Callable[[int, int, str], Candidate]]] = {
    "bitsandbytes NF4": (torch.float16, _nf4),
    "torch int4 (tinygemm)": (torch.bfloat16, _tinygemm),
    "gemlite 4-bit": (torch.float16, _gemlite),
    "hqq package 4-bit": (torch.float16, _hqq_package),
}
# Its first call compiles CUDA code, which takes a minute or two.
SLOW_PEERS: dict[str, tuple[torch.dtype, Callable[[int, int, str], Candidate]]] = {
    "aqlm package 2x8": (torch.float16, _aqlm_package(2, 8)),
    "aqlm package 1x16": (torch.float16, _aqlm_package(1, 16)),
}
