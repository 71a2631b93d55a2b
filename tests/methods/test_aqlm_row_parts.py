"""AQLM weights whose rows lie in parts with codebooks of their own, as gate and up of published mixtures have them."""

import pytest
import torch

import peft_quantlayers as pql
from peft_quantlayers import QuantizedWeight
from peft_quantlayers.methods import get_method, move_aqlm_codes

METHOD = get_method("aqlm")
PLAIN = pql.AQLMSpec(num_codebooks=2, nbits_per_codebook=4, in_group_size=4, rounds=1)
LARGE_CODES = pql.AQLMSpec(num_codebooks=1, nbits_per_codebook=9, in_group_size=4, rounds=1)
TALL_GROUPS = pql.AQLMSpec(num_codebooks=1, nbits_per_codebook=4, in_group_size=4, out_group_size=2, rounds=1)
specs = pytest.mark.parametrize("spec", [PLAIN, LARGE_CODES, TALL_GROUPS])


def weights(*scales: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(24, 32, generator=generator) * scale for scale in scales]


def joined(spec: pql.AQLMSpec = PLAIN, *scales: float) -> tuple[list[QuantizedWeight], QuantizedWeight]:
    parts = [METHOD.quantize(weight, spec) for weight in weights(*(scales or (1.0, 3.0)))]
    return parts, QuantizedWeight.joined(parts)


@specs
@pytest.mark.parametrize("n_parts", [2, 3])
def test_joined_weights_are_the_weights_one_above_the_other(spec, n_parts):
    parts, whole = joined(spec, *range(1, n_parts + 1))
    whole.check("layer")
    assert whole.spec.row_parts == n_parts
    assert torch.equal(METHOD.dequantize(whole), torch.cat([METHOD.dequantize(part) for part in parts]))
    assert whole.bits_per_weight == pytest.approx(parts[0].bits_per_weight)
    for at, part in enumerate(parts):
        found = whole.rows(slice(24 * at, 24 * (at + 1)))
        assert found.spec == spec
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in part.tensors.items())


@specs
def test_rows_of_one_part_and_of_several(spec):
    _, whole = joined(spec, 1.0, 2.0, 3.0)
    dense = METHOD.dequantize(whole)
    for rows in (slice(4, 20), slice(24, 48), slice(0, 48), slice(24, 72), slice(50, 72)):
        assert torch.equal(METHOD.dequantize(whole.rows(rows)), dense[rows])
    with pytest.raises(ValueError, match="codebooks"):
        whole.rows(slice(20, 30))


def test_a_stack_of_joined_weights_has_their_parts():
    whole = [joined(PLAIN, 1.0, scale)[1] for scale in (2.0, 3.0)]
    stack = QuantizedWeight.stacked(whole)
    for expert in range(2):
        assert torch.equal(METHOD.dequantize(stack[expert]), METHOD.dequantize(whole[expert]))
        upper = stack.rows(slice(24, 48))[expert]
        assert torch.equal(METHOD.dequantize(upper), METHOD.dequantize(whole[expert])[24:])


@specs
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_and_their_gradients_are_those_of_the_dense_weight(spec, has_bias):
    _, whole = joined(spec)
    bias = torch.randn(48) if has_bias else None
    tensors = {n: t.float() if t.is_floating_point() else t for n, t in whole.tensors.items()}
    tensors = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()}
    wide = QuantizedWeight(spec=whole.spec.widened(), out_features=48, in_features=32, tensors=tensors)
    x = torch.randn(5, 32, requires_grad=True)
    grad = torch.randn(5, 48)
    inputs = [x, tensors["codebooks"], tensors["scales"]]
    y = METHOD.linear(x, wide, bias)
    expected = torch.nn.functional.linear(x, METHOD.dequantize(wide), bias)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad(y, inputs, grad)
    for one, other in zip(found, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)


@specs
def test_tiles_cover_all_rows(spec):
    _, whole = joined(spec)
    dense = torch.full((48, 32), torch.nan)
    for rows, tile in METHOD.weight_tiles(whole, dtype=torch.float32):
        dense[rows] = tile
    assert torch.equal(dense, METHOD.dequantize(whole))


def test_quantizing_with_parts_is_quantizing_each_part():
    given = weights(1.0, 3.0)
    spec = with_parts(PLAIN, 2)
    found = METHOD.quantize(torch.cat(given), spec)
    parts, whole = joined()
    assert found.spec == whole.spec
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in whole.tensors.items())
    hessian = torch.eye(32) + 0.1
    again = METHOD.quantize(torch.cat(given), spec, hessian=hessian, start=found, iterations=1)
    for part, at in zip(parts, (0, 24), strict=True):
        wanted = METHOD.quantize(given[at // 24], PLAIN, hessian=hessian, start=part, iterations=1)
        assert torch.equal(METHOD.dequantize(again.rows(slice(at, at + 24))), METHOD.dequantize(wanted))


def with_parts(spec: pql.AQLMSpec, n_parts: int) -> pql.AQLMSpec:
    return pql.AQLMSpec.from_dict(spec.to_dict() | {"row_parts": n_parts})


def test_a_part_that_needs_wider_scales_widens_all():
    _, whole = joined(PLAIN, 1.0, 1e-7)
    assert whole.spec.scale_dtype == "float32"
    assert torch.isfinite(METHOD.dequantize(whole)).all()
    assert METHOD.dequantize(whole)[24:].any()


@specs
def test_a_delta_is_added_and_codebooks_stay(spec):
    _, whole = joined(spec)
    delta = torch.zeros(48, 32)
    assert torch.equal(METHOD.merged(whole, lambda rows: delta[rows]).tensors["codes"], whole.tensors["codes"])
    delta[30:] = 0.5 * torch.randn(18, 32)
    merged = METHOD.merged(whole, lambda rows: delta[rows])
    assert torch.equal(
        merged.tensors["codes"][: 24 // spec.out_group_size], whole.tensors["codes"][: 24 // spec.out_group_size]
    )
    moved = METHOD.dequantize(merged) - METHOD.dequantize(whole)
    assert (moved * delta).sum() > 0.5 * delta.square().sum()


def test_codes_move_along_a_gradient_in_each_part():
    _, whole = joined()
    gradient = torch.randn(48, 32)
    moved, n_changed = move_aqlm_codes(whole, gradient, step=3.0, max_change=0.1, trust_ratio=1.0)
    assert 0 < n_changed <= int(0.1 * 48 * 8)
    difference = METHOD.dequantize(moved) - METHOD.dequantize(whole)
    assert (difference * gradient).sum() < 0
    assert difference[:24].any()
    assert difference[24:].any()


def test_what_older_versions_know_is_written_as_before():
    assert "row_parts" not in PLAIN.to_dict()
    assert PLAIN.format_version == 1
    spec = with_parts(PLAIN, 2)
    assert spec.to_dict()["row_parts"] == 2
    assert spec.format_version == 7


@pytest.mark.parametrize("n_parts", [5, 16])
def test_rows_that_cannot_be_parted_are_refused(n_parts):
    with pytest.raises(ValueError, match=f"out_features=48 .*row_parts={n_parts}"):
        METHOD.quantize(torch.cat(weights(1.0, 1.0)), with_parts(TALL_GROUPS, n_parts))


def test_hqq_weights_are_joined_where_their_rows_are_by_themselves():
    method = get_method("hqq")
    for axis in (0, 1):
        parts = [
            method.quantize(weight, pql.HQQSpec(nbits=4, group_size=8, axis=axis)) for weight in weights(1.0, 2.0)
        ]
        if axis == 0:
            with pytest.raises(ValueError, match="cannot lie in one"):
                QuantizedWeight.joined(parts)
            continue
        whole = QuantizedWeight.joined(parts)
        assert whole.spec == parts[0].spec
        assert torch.equal(method.dequantize(whole), torch.cat([method.dequantize(part) for part in parts]))
