"""QuantMethod.merged: no delta gives the same bits, a small one arrives on average, and nothing else moves."""

import pytest
import torch

from peft_quantlayers import AQLMSpec, HQQSpec, QuantSpec
from peft_quantlayers.formats import QuantizedWeight
from peft_quantlayers.methods import get_method
from quantlayers_kernels.hqq.update import DITHER_ROWS, dither_pattern

SPECS = [  # By hand: the methods whose merge is their own; tests/contract has the others.
    HQQSpec(nbits=4, group_size=64),
    HQQSpec(nbits=3, group_size=None),
    HQQSpec(nbits=8, group_size=64, axis=0),
    HQQSpec(nbits=4, group_size=64, integer_zero=True),
    AQLMSpec(rounds=1, nbits_per_codebook=6),
    AQLMSpec(rounds=1, nbits_per_codebook=6, num_codebooks=1, out_group_size=2, in_group_size=4),
]


def quantized(spec: QuantSpec, shape: tuple[int, int] = (320, 192)) -> QuantizedWeight:
    weight = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return get_method(spec.method).quantize(weight, spec)


def dense(weight: QuantizedWeight) -> torch.Tensor:
    method = get_method(weight.spec.method)
    return method.dequantize(weight)


def merged(weight: QuantizedWeight, delta: torch.Tensor) -> QuantizedWeight:
    return get_method(weight.spec.method).merged(weight, lambda rows: delta[rows])


def small_delta(weight: QuantizedWeight, size: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (weight.out_features, weight.in_features)
    delta = torch.randn(shape[0], 4, generator=generator) @ torch.randn(4, shape[1], generator=generator)
    return delta * (size * dense(weight).norm() / delta.norm())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_delta_gives_the_same_bits(spec):
    weight = quantized(spec)
    after = merged(weight, torch.zeros(weight.out_features, weight.in_features))
    assert all(torch.equal(after.tensors[name], tensor) for name, tensor in weight.tensors.items())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_delta_of_a_fiftieth_arrives_on_average_and_moves_codes_only(spec):
    weight = quantized(spec)
    delta = small_delta(weight)
    after = merged(weight, delta)
    arrived = dense(after) - dense(weight)
    # Noise alone gives a coefficient with a deviation of about (noise / delta) / sqrt(n_weights) = 0.04 at most.
    assert float((arrived * delta).sum() / delta.square().sum()) == pytest.approx(1.0, abs=0.15)
    for name, tensor in weight.tensors.items():
        assert torch.equal(after.tensors[name], tensor) == (name != spec.codes_name)


@pytest.mark.parametrize("spec", SPECS[:4], ids=str)
def test_the_tiles_are_those_of_the_merged_weight(spec, set_tile_elements):
    set_tile_elements(192 * 100)  # tiles that end anywhere
    weight = quantized(spec)
    delta = small_delta(weight)
    method = get_method(spec.method)
    tiles = method.merged_tiles(weight, lambda rows: delta[rows], dtype=torch.float32)
    whole = torch.full((320, 192), float("nan"))
    for rows, tile in tiles:
        whole[rows] = tile
    assert torch.equal(whole, dense(merged(weight, delta)))


def test_codes_stay_in_range_whatever_the_change():
    weight = quantized(HQQSpec(nbits=3, group_size=64))
    delta = torch.full((320, 192), 100.0)
    high, low = (dense(merged(weight, sign * delta)) for sign in (1, -1))
    scale, zero = (weight.tensors[name].float().repeat_interleave(64, dim=1) for name in ("scale", "zero"))
    torch.testing.assert_close(high, (7 - zero) * scale)
    torch.testing.assert_close(low, -zero * scale)


def test_the_dither_is_white_and_never_moves_a_code_by_itself():
    pattern = dither_pattern(1000, torch.device("cpu"))
    assert pattern.shape == (DITHER_ROWS, 1000)
    assert pattern.abs().max() < 0.5
    assert torch.equal((pattern + 255).round(), torch.full_like(pattern, 255))
    assert pattern.mean().abs() < 0.003
    assert pattern.std() == pytest.approx(12**-0.5, rel=0.01)
    for shifted in (pattern.roll(1, 0), pattern.roll(1, 1)):
        assert (pattern * shifted).mean().abs() < 0.001
