"""Linear layers that multiply the same number of weights, ours and the peers': what ``bench_decode.py`` times.

Weights are random, since the time does not depend on them. Each layer comes with its dequantized weight, so that its
product can be checked before it is timed.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import peft_quantlayers as pql
from quantlayers_kernels.aqlm.reference import dequantize_aqlm_reference
from quantlayers_kernels.bitpack import pack

GROUP_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to multiply.

    Fields:
        multiply: x (tokens, in_features), float32, to (tokens, out_features).
        weight: the dequantized weight, float32.
        nbytes: bytes of the stored weight, each of which must be read once.
        is_ours: whether a wrong result ends the benchmark; a peer's is only recorded.
        tolerance: relative error that its arithmetic allows.
        max_tokens: not timed with more.
    """

    multiply: Callable[[Tensor], Tensor]
    weight: Tensor
    nbytes: int
    is_ours: bool = False
    tolerance: float = 1e-5
    max_tokens: int = 1 << 20


def _layer_of(spec: pql.QuantSpec, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Candidate:
    """Our layer with these tensors, called as a module."""
    weight = pql.QuantizedWeight(spec=spec, out_features=shape[0], in_features=shape[1], tensors=tensors)
    layer = pql.layer_type(spec.method)(weight, compute_dtype=torch.float32)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return Candidate(multiply=layer, weight=layer.dequantize(torch.float32), nbytes=nbytes, is_ours=True)


def _hqq(out_features: int, in_features: int, nbits: int, group_size: int = GROUP_SIZE) -> Candidate:
    codes = torch.randint(0, 2**nbits, (out_features, in_features), dtype=torch.uint8)
    scale = (0.01 + 0.01 * torch.rand(out_features, in_features // group_size)).half()
    zero = ((2**nbits - 1) * torch.rand(scale.shape)).half()
    tensors = {"W_q": pack(codes, nbits), "scale": scale, "zero": zero}
    return _layer_of(pql.HQQSpec(nbits=nbits, group_size=group_size), tensors, (out_features, in_features))


def _rounding(exact: Candidate) -> Candidate:
    """The same layer, with inputs rounded to 8 bits."""
    layer = copy.deepcopy(cast(nn.Module, exact.multiply)).eval()
    pql.set_activation_bits(layer, 8)
    return replace(exact, multiply=layer, tolerance=2e-2)


def _in_bfloat16(exact: Candidate) -> Candidate:
    """The same layer, with inputs and results in bfloat16."""
    layer = copy.deepcopy(cast(nn.Module, exact.multiply)).bfloat16().eval()
    return replace(exact, multiply=lambda x: layer(x.bfloat16()), tolerance=2e-2)


def _aqlm_tensors(out_features: int, in_features: int, num_codebooks: int, nbits: int) -> tuple[Tensor, ...]:
    code_type = torch.int8 if nbits == 8 else torch.int16
    limits = torch.iinfo(code_type)
    codes = torch.randint(limits.min, limits.max + 1, (out_features, in_features // 8, num_codebooks)).to(code_type)
    codebooks = torch.randn(num_codebooks, 2**nbits, 1, 8).half()
    return codes, codebooks, (0.01 + 0.01 * torch.rand(out_features, 1, 1, 1)).half()


def _aqlm(tensors: tuple[Tensor, ...]) -> Candidate:
    codes, codebooks, scales = tensors
    spec = pql.AQLMSpec(num_codebooks=len(codebooks), nbits_per_codebook=codebooks.shape[1].bit_length() - 1)
    shape = len(codes), codes.shape[1] * codebooks.shape[3]
    return _layer_of(spec, {"codes": codes, "codebooks": codebooks, "scales": scales}, shape)


def _aqlm_package(tensors: tuple[Tensor, ...]) -> Candidate:
    """Its layer in float32, the only dtype that its CPU kernel takes; one row at a time, so few tokens only."""
    from aqlm import QuantizedLinear

    codes, codebooks, scales = tensors
    num_codebooks, size, _, _ = codebooks.shape
    out_features, in_features = codes.shape[0], codes.shape[1] * 8
    layer = QuantizedLinear(in_features, out_features, 8, 1, num_codebooks, size.bit_length() - 1, bias=False)
    layer.codes.data = codes.clone()
    layer.codebooks.data, layer.scales.data = codebooks.float(), scales.float()
    nbytes = codes.nbytes + layer.codebooks.nbytes + layer.scales.nbytes
    return Candidate(
        multiply=layer,
        weight=dequantize_aqlm_reference(codes, codebooks, scales),
        nbytes=nbytes,
        max_tokens=16 if size == 256 else 1 << 20,
    )


def _hqq_package(out_features: int, in_features: int) -> Candidate:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=GROUP_SIZE, axis=1)
    config["weight_quant_params"]["optimize"] = False  # the weight's quality is not measured here
    dense = nn.Linear(in_features, out_features, bias=False)
    layer = HQQLinear(dense, config, compute_dtype=torch.float32, device="cpu")
    nbytes = layer.W_q.nbytes + layer.meta["scale"].nbytes + layer.meta["zero"].nbytes
    return Candidate(multiply=layer, weight=layer.dequantize().clone(), nbytes=nbytes)


def _torch_int4(out_features: int, in_features: int) -> Candidate:
    """torch's own 4-bit product; bfloat16, (code - 8) * scale + zero."""
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    scale_and_zero = (0.01 + 0.01 * torch.rand(in_features // GROUP_SIZE, out_features, 2)).bfloat16()
    scale, zero = scale_and_zero.float().repeat_interleave(GROUP_SIZE, 0).unbind(-1)
    return Candidate(
        multiply=lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.bfloat16(), packed, GROUP_SIZE, scale_and_zero
        ).float(),
        weight=(codes.float() - 8) * scale.t() + zero.t(),
        nbytes=packed.nbytes + scale_and_zero.nbytes,
        tolerance=2e-2,
    )


def _bitsandbytes_nf4(weight: Tensor) -> Candidate:
    import bitsandbytes.functional as bnb
    from bitsandbytes import matmul_4bit

    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=GROUP_SIZE)
    return Candidate(
        multiply=lambda x: matmul_4bit(x, codes.t(), quant_state=state),
        weight=bnb.dequantize_4bit(codes, state),
        nbytes=codes.nbytes + state.absmax.nbytes,
    )


def _with_lora(layer: nn.Module, weight: Tensor, nbytes: int, forward: Callable | None = None) -> Candidate:
    """``layer`` under PEFT with an adapter of rank 8, without gradients; ``forward`` in place of its own."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
    lora = get_peft_model(nn.Sequential(layer), config).eval().base_model.model[0]
    A, B = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    return Candidate(
        multiply=lora if forward is None else lambda x: forward(lora, x),
        weight=weight + lora.scaling["default"] * (B @ A).detach(),
        nbytes=nbytes + A.nbytes + B.nbytes,
        is_ours=forward is None,
    )


def _hqq_with_lora(out_features: int, in_features: int, forward: Callable | None = None) -> Candidate:
    dense = nn.Linear(in_features, out_features, bias=False)
    layer = pql.QuantizedLinear.from_linear(dense, pql.HQQSpec(nbits=4, group_size=GROUP_SIZE, iters=0))
    nbytes = sum(tensor.nbytes for tensor in layer.quantized_weight.tensors.values())
    return _with_lora(layer, layer.dequantize(torch.float32), nbytes, forward)


def layer_with(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def candidates(out_features: int, in_features: int, *, with_slow_peers: bool) -> Iterator[tuple[str, Candidate]]:
    """Names and ways to multiply, the dense one first."""
    dense = torch.randn(out_features, in_features)
    yield (
        "dense float32",
        Candidate(multiply=layer_with(dense), weight=dense, nbytes=dense.nbytes, is_ours=True),
    )
    for nbits in (4, 3, 2, 8):
        exact = _hqq(out_features, in_features, nbits)
        yield f"HQQ {nbits}-bit", exact
        if nbits < 5:
            yield f"HQQ {nbits}-bit, bfloat16", _in_bfloat16(exact)
        if nbits < 8:
            yield f"HQQ {nbits}-bit, 8-bit activations", _rounding(exact)
    yield "HQQ 2-bit g16", _hqq(out_features, in_features, 2, group_size=16)
    two_by_eight = _aqlm_tensors(out_features, in_features, 2, 8)
    one_by_sixteen = _aqlm_tensors(out_features, in_features, 1, 16)
    yield "AQLM 2x8", _aqlm(two_by_eight)
    yield "AQLM 1x16", _aqlm(one_by_sixteen)
    yield "torch int4, bfloat16", _torch_int4(out_features, in_features)
    yield "dense float32 + LoRA", _with_lora(layer_with(dense), dense, dense.nbytes)
    yield "HQQ 4-bit + LoRA", _hqq_with_lora(out_features, in_features)
    from peft.tuners.lora import Linear as LoraLinear

    yield "HQQ 4-bit + LoRA, PEFT's forward", _hqq_with_lora(out_features, in_features, LoraLinear.forward)
    if with_slow_peers:
        half = dense.bfloat16()  # emulated where the CPU has no units for it
        yield (
            "dense bfloat16",
            Candidate(
                multiply=lambda x: linear(x.bfloat16(), half).float(),
                weight=dense,
                nbytes=half.nbytes,
                is_ours=True,
                tolerance=2e-2,
            ),
        )
        yield "bitsandbytes NF4", _bitsandbytes_nf4(dense)
        yield "hqq package 4-bit", _hqq_package(out_features, in_features)
        yield "aqlm package 2x8", _aqlm_package(two_by_eight)
        yield "aqlm package 1x16", _aqlm_package(one_by_sixteen)
