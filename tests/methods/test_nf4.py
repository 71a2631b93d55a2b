"""NF4 against bitsandbytes, its double quantization, ragged shapes, and what it refuses."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from peft_quantlayers.formats import QuantizedWeight
from peft_quantlayers.methods import get_method
from peft_quantlayers.methods.nf4 import LEVELS, NF4Spec

METHOD = get_method("nf4")
LARGEST_GAP = max(b - a for a, b in pairwise(LEVELS))


def random_weight(*shape: int) -> Tensor:
    return 0.05 * torch.randn(shape)


def error_of(weight: Tensor, dense: Tensor) -> float:
    return float((dense - weight).norm() / weight.norm())


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("shape", [(64, 256), (3, 64), (17, 192)])
def test_codes_and_maxima_are_those_of_bitsandbytes(shape, bitsandbytes):
    weight = random_weight(*shape)
    weight[0, :64] = 0
    packed, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    theirs = torch.stack([packed >> 4, packed & 15], -1).view(shape)
    quantized = METHOD.quantize(weight, NF4Spec(block_size=64))
    assert torch.equal(quantized.codes().to(theirs.dtype), theirs)
    assert torch.equal(quantized.tensors["absmax"].flatten(), state.absmax)
    torch.testing.assert_close(METHOD.dequantize(quantized), bitsandbytes.dequantize_4bit(packed, state))


def test_the_error_of_double_quantization_is_no_higher_than_that_of_bitsandbytes(bitsandbytes):
    weight = random_weight(64, 2048) * torch.rand(64, 1).exp()
    packed, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    theirs = error_of(weight, bitsandbytes.dequantize_4bit(packed, state))
    plain, double = (METHOD.quantize(weight, NF4Spec(double_quant=is_double)) for is_double in (False, True))
    ours = error_of(weight, METHOD.dequantize(double))
    assert ours <= 1.01 * theirs
    assert ours <= 1.02 * error_of(weight, METHOD.dequantize(plain))
    assert plain.bits_per_weight == 4 + 32 / 64
    assert double.bits_per_weight == 4 + 8 / 64 + 2 * 32 / 2048


def test_double_quantization_keeps_each_maximum_within_half_a_step_of_8_bits():
    weight = random_weight(16, 2048)
    maxima = weight.view(16, -1, 64).abs().amax(2)
    low, high = maxima.aminmax(dim=1, keepdim=True)
    tensors = METHOD.quantize(weight, NF4Spec(double_quant=True)).tensors
    stored = tensors["absmax"] * tensors["absmax_scale"] + tensors["absmax_offset"]
    assert ((stored - maxima).abs() <= (high - low) / 510 * 1.001).all()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("shape", "block_size"), [((1, 1), 1), ((3, 5), 5), ((2, 15), 5), ((5, 63), 9), ((1, 64), 64)]
)
def test_ragged_shapes_keep_each_weight_within_half_a_gap(shape, block_size, double_quant):
    weight = random_weight(*shape)
    quantized = METHOD.quantize(weight, NF4Spec(block_size=block_size, double_quant=double_quant))
    quantized.check("layer")
    assert tuple(quantized.codes().shape) == shape
    assert torch.equal(quantized.with_codes(quantized.codes()).tensors["codes"], quantized.tensors["codes"])
    maxima = weight.view(shape[0], -1, block_size).abs().amax(2).repeat_interleave(block_size, 1)
    slack = 0.01 * weight.abs().max() if double_quant else 1e-7
    assert ((METHOD.dequantize(quantized) - weight).abs() <= LARGEST_GAP / 2 * maxima + slack).all()


def test_a_block_for_each_weight_holds_it_exactly():
    weight = random_weight(7, 9)
    weight[2, 3] = 0
    assert torch.equal(METHOD.dequantize(METHOD.quantize(weight, NF4Spec(block_size=1))), weight)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_weight_of_zeros_stays_zero(double_quant):
    quantized = METHOD.quantize(torch.zeros(4, 64), NF4Spec(double_quant=double_quant))
    assert not METHOD.dequantize(quantized).any()


def test_maxima_that_their_dtype_cannot_hold_widen_the_spec():
    assert METHOD.quantize(random_weight(4, 64), NF4Spec(scale_dtype="float16")).spec.scale_dtype == "float16"
    for factor in (1e8, 1e-8):
        weight = factor * random_weight(4, 64)
        quantized = METHOD.quantize(weight, NF4Spec(scale_dtype="float16"))
        assert quantized.spec.scale_dtype == "float32"
        assert error_of(weight, METHOD.dequantize(quantized)) < 0.15


def test_a_start_keeps_its_maxima_and_is_not_changed():
    first = METHOD.quantize(random_weight(4, 128), NF4Spec())
    codes = first.codes().clone()
    again = METHOD.quantize(0.5 * random_weight(4, 128), first.spec, start=first)
    assert torch.equal(again.tensors["absmax"], first.tensors["absmax"])
    assert not torch.equal(again.codes(), codes)
    assert torch.equal(first.codes(), codes)


def test_rows_and_stacks_are_dequantized_by_themselves():
    weights = [METHOD.quantize(random_weight(6, 64), NF4Spec(double_quant=True)) for _ in range(2)]
    stack = QuantizedWeight.stacked(weights)
    for index, weight in enumerate(weights):
        assert torch.equal(METHOD.dequantize(stack[index]), METHOD.dequantize(weight))
        assert torch.equal(METHOD.dequantize(stack.rows(slice(1, 4))[index]), METHOD.dequantize(weight)[1:4])


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size=0"),
        ({"block_size": True}, TypeError, "block_size must be an integer"),
        ({"double_quant": "yes"}, ValueError, "double_quant='yes'"),
        ({"scale_dtype": "int8"}, ValueError, "scale_dtype='int8'"),
        ({"nbits": 4}, ValueError, "unknown field"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused_when_it_is_made(fields, error, message):
    with pytest.raises(error, match=message):
        NF4Spec.from_dict(fields)


def test_a_weight_that_cannot_be_quantized_is_refused():
    with pytest.raises(ValueError, match=r"in_features=96 is not a multiple of block_size=64.*for example 48"):
        METHOD.quantize(random_weight(4, 96), NF4Spec())
    with pytest.raises(ValueError, match="NaN or Inf"):
        METHOD.quantize(torch.full((2, 64), torch.inf), NF4Spec())
    with pytest.raises(ValueError, match=r"Hessian must be float32 of shape \(64, 64\)"):
        METHOD.quantize(random_weight(2, 64), NF4Spec(), hessian=torch.eye(32))
    with pytest.raises(ValueError, match="never seen"):
        METHOD.quantize(random_weight(2, 64), NF4Spec(), hessian=torch.zeros(64, 64))
