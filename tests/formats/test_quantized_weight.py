"""A quantized weight as a value: codes, rows, stacks, and what its check refuses; by a spec that no method has."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from peft_quantlayers import QuantizedWeight, QuantSpec, TensorLayout


@dataclass(frozen=True, kw_only=True)
class PairSpec(QuantSpec):
    """Two 4-bit codes a byte, a scale for each ``height`` rows, and a table that all rows share."""

    method = "pairs"
    height: int = 1

    def tensor_layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        if out_features % self.height:
            raise ValueError(f"out_features={out_features} is not a multiple of height={self.height}.")
        return {
            "codes": TensorLayout(shape=(out_features, (in_features + 1) // 2), dtype=torch.uint8, role="codes"),
            "scale": TensorLayout(
                shape=(out_features // self.height, 1), dtype=torch.float16, role="scales", rows_per_entry=self.height
            ),
            "table": TensorLayout(shape=(16,), dtype=torch.float32, role="codebooks", rows_per_entry=None),
        }

    def unpack_codes(self, codes: Tensor, in_features: int) -> Tensor:
        return torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :in_features]

    def pack_codes(self, codes: Tensor) -> Tensor:
        padded = pad(codes, (0, codes.shape[-1] % 2))
        return padded[..., ::2] | padded[..., 1::2] << 4


def random_weight(leading: tuple[int, ...] = (), n_groups: int = 4, in_features: int = 5, height: int = 2):
    """A weight of random codes and scales, and its codes."""
    spec, out_features = PairSpec(height=height), n_groups * height
    codes = torch.randint(0, 16, (*leading, out_features, in_features), dtype=torch.uint8)
    tensors = {
        "codes": spec.pack_codes(codes),
        "scale": 1 + torch.rand(*leading, n_groups, 1).half(),
        "table": torch.randn(*leading, 16),
    }
    weight = QuantizedWeight(
        spec=spec, out_features=out_features, in_features=in_features, tensors=tensors, leading=leading
    )
    return weight, codes


def same_bits(found: QuantizedWeight, expected: QuantizedWeight) -> bool:
    return (
        (found.spec, found.shape) == (expected.spec, expected.shape)
        and found.tensors.keys() == expected.tensors.keys()
        and all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    )


WEIGHTS = {
    "leading": st.lists(st.integers(1, 3), max_size=2).map(tuple),
    "n_groups": st.integers(1, 4),
    "in_features": st.integers(1, 9),
    "height": st.integers(1, 3),
}


@given(**WEIGHTS)
@settings(max_examples=40, deadline=None)
def test_codes_are_read_and_replaced_and_the_weight_itself_stays(leading, n_groups, in_features, height):
    weight, codes = random_weight(leading, n_groups, in_features, height)
    weight.check("weight")
    assert weight.shape == (*leading, n_groups * height, in_features)
    assert torch.equal(weight.codes(), codes)
    assert same_bits(weight.with_codes(codes), weight)
    other = weight.with_codes(15 - codes)
    other.check("other")
    assert torch.equal(other.codes(), 15 - codes)
    assert torch.equal(weight.codes(), codes)
    assert all(other.tensors[name] is weight.tensors[name] for name in ("scale", "table"))


@given(**WEIGHTS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_rows_are_those_of_every_weight_and_share_memory(leading, n_groups, in_features, height, data):
    weight, codes = random_weight(leading, n_groups, in_features, height)
    assert weight.row_multiple == height
    first = data.draw(st.integers(0, n_groups - 1))
    last = data.draw(st.integers(first + 1, n_groups))
    rows = slice(first * height, last * height)
    part = weight.rows(rows)
    part.check("part")
    assert part.shape == (*leading, (last - first) * height, in_features)
    assert torch.equal(part.codes(), codes[..., rows, :])
    assert torch.equal(part.tensors["scale"], weight.tensors["scale"][..., first:last, :])
    assert part.tensors["table"] is weight.tensors["table"]
    for name, tensor in part.tensors.items():
        assert tensor.untyped_storage().data_ptr() == weight.tensors[name].untyped_storage().data_ptr()


def test_rows_may_be_named_as_in_any_slice():
    weight, codes = random_weight()
    assert same_bits(weight.rows(slice(None)), weight)
    assert torch.equal(weight.rows(slice(-2, None)).codes(), codes[-2:])
    assert torch.equal(weight.rows(slice(4, 100)).codes(), codes[4:])


@pytest.mark.parametrize("rows", [slice(0, 0), slice(4, 2), slice(8, None), slice(0, 8, 2), slice(None, None, -1)])
def test_a_slice_that_is_no_range_of_rows_is_refused(rows):
    with pytest.raises(ValueError, match="names no range of the 8 rows"):
        random_weight()[0].rows(rows)


@pytest.mark.parametrize("rows", [slice(1, 4), slice(0, 3)])
def test_rows_that_cut_through_an_entry_are_refused_by_its_name(rows):
    with pytest.raises(ValueError, match="cut through an entry of scale, which holds 2 rows"):
        random_weight()[0].rows(rows)


@given(**WEIGHTS, count=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_a_stack_gives_each_of_its_weights_back(leading, n_groups, in_features, height, count):
    weights = [random_weight(leading, n_groups, in_features, height)[0] for _ in range(count)]
    stack = QuantizedWeight.stacked(weights)
    stack.check("stack")
    assert stack.shape == (count, *weights[0].shape)
    assert stack.bits_per_weight == pytest.approx(weights[0].bits_per_weight)
    assert all(same_bits(found, weight) for found, weight in zip(stack, weights, strict=True))
    assert same_bits(stack[-1], weights[-1])
    assert same_bits(stack.rows(slice(0, height))[0], weights[0].rows(slice(0, height)))
    stack.tensors["codes"].zero_()
    assert stack[0].codes().sum() == 0
    assert torch.equal(QuantizedWeight.stacked(weights).codes(), torch.stack([each.codes() for each in weights]))


def test_only_an_entry_that_is_there_is_taken_from_a_stack():
    weight, _ = random_weight((2, 3))
    assert weight[1][2].leading == ()
    for entry, index in ((weight, 2), (weight, -3), (weight[0], 3), (weight[0][0], 0)):
        with pytest.raises(IndexError, match="out of range"):
            entry[index]


def test_weights_of_different_kinds_are_not_stacked():
    one = random_weight()[0]
    for others in ([], [one, random_weight(height=4, n_groups=2)[0]], [one, random_weight(in_features=6)[0]]):
        with pytest.raises(ValueError, match="one spec and one shape"):
            QuantizedWeight.stacked(others)


def test_bits_per_weight_count_every_tensor():
    weight, _ = random_weight((3,), n_groups=4, in_features=5, height=2)
    stored = 3 * (8 * 3 * 8 + 4 * 16 + 16 * 32)
    assert weight.bits_per_weight == stored / math.prod((3, 8, 5))
    assert weight.spec.bits_per_weight(8, 5)[1] == pytest.approx(weight.bits_per_weight)


def test_moving_to_the_device_where_it_is_copies_nothing():
    weight, _ = random_weight()
    assert all(tensor is weight.tensors[name] for name, tensor in weight.to(torch.device("cpu")).tensors.items())
    assert {tensor.device.type for tensor in weight.to(torch.device("meta")).tensors.values()} == {"meta"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": None}, r"layer: expected the tensors \['codes', 'scale', 'table'\], got \['codes', 'scale'\]"),
        ({"zero": torch.zeros(1)}, "layer: expected the tensors"),
        ({"codes": torch.zeros(8, 2, dtype=torch.uint8)}, r"layer\.codes: expected torch\.uint8 of shape \(8, 3\)"),
        ({"scale": torch.ones(4, 1)}, r"layer\.scale: expected torch\.float16 .*got torch\.float32"),
        ({"scale": torch.full((4, 1), torch.nan).half()}, r"layer\.scale holds NaN or Inf.*damaged"),
        ({"table": torch.full((16,), torch.inf)}, r"layer\.table holds NaN or Inf.*damaged"),
        ({"scale": torch.zeros(4, 1).half()}, r"layer\.scale holds nothing but zeros.*damaged"),
    ],
)
def test_what_does_not_fit_the_layout_is_refused_by_name(changes, message):
    weight, _ = random_weight()
    for name, tensor in changes.items():
        weight.tensors.pop(name, None)
        if tensor is not None:
            weight.tensors[name] = tensor
    with pytest.raises(ValueError, match=message):
        weight.check("layer")


def test_a_stack_without_its_leading_dimension_is_refused():
    weight, _ = random_weight((2,))
    weight.tensors["scale"] = weight.tensors["scale"][0]
    with pytest.raises(ValueError, match=r"layer\.scale: expected torch\.float16 of shape \(2, 4, 1\)"):
        weight.check("layer")
