"""Dense bit strings, and the pure maths of grids."""

import pytest
import torch

from peft_quantlayers import HQQSpec
from peft_quantlayers.exports.bit_strings import pack_rows, unpack_rows
from peft_quantlayers.exports.uniform_grid import are_zeros_codes, in_eight_bits, uniform_grid, with_rounded_zeros
from peft_quantlayers.methods import get_method


def some_grid(nbits=4, group_size=16, *, shift=0.0):
    weight = torch.randn(12, 64) + shift
    return uniform_grid(get_method("hqq").quantize(weight, HQQSpec(nbits=nbits, group_size=group_size)))


@pytest.mark.parametrize("nbits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 31, 64, 100])
def test_unpack_inverts_pack_and_words_are_dense(nbits, columns):
    codes = torch.randint(0, 2**nbits, (3, columns), dtype=torch.uint8)
    packed = pack_rows(codes, nbits)
    assert packed.shape == (3, -(-columns * nbits // 32))
    assert packed.dtype == torch.int32
    assert torch.equal(unpack_rows(packed, nbits, columns), codes)


@pytest.mark.parametrize("nbits", [3, 4, 5, 8])
def test_the_first_code_lies_in_the_lowest_bits(nbits):
    codes = torch.arange(8, dtype=torch.uint8)[None] & (2**nbits - 1)
    expected = sum(int(code) << (nbits * place) for place, code in enumerate(codes[0]))
    found = sum(int(word) % 2**32 << (32 * place) for place, word in enumerate(pack_rows(codes, nbits)[0]))
    assert found == expected


@pytest.mark.parametrize("group_size", [4, 8, 16])
def test_smaller_groups_hold_the_same_weight(group_size):
    grid = some_grid()
    smaller = grid.with_groups_of(group_size)
    assert smaller.group_size == group_size
    assert torch.equal(smaller.dequantize(), grid.dequantize())


@pytest.mark.parametrize("nbits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])  # zeros among the codes, below them, above them
def test_eight_bits_hold_about_the_same_weight_with_zeros_that_are_codes(nbits, shift):
    grid = some_grid(nbits, shift=shift)
    wide = in_eight_bits(grid)
    assert wide.nbits == 8
    assert are_zeros_codes(wide.zero, 8)
    # At most half a step of the finer grid; another half where 8-bit codes are rounded too.
    error = (wide.dequantize() - grid.dequantize()).abs().view(*grid.scale.shape, -1).amax(-1)
    assert (error <= (1.001 if nbits == 8 and shift else 0.501) * wide.scale).all()


def test_four_bit_codes_are_multiplied_by_17():
    grid = some_grid()
    inside = ((grid.zero >= 0) & (grid.zero <= 15)).all(dim=1)
    assert inside.any()
    assert torch.equal(in_eight_bits(grid).codes[inside], grid.codes[inside] * 17)


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_rounded_zeros_and_their_correction_are_the_weight(shift):
    grid = some_grid(shift=shift)
    rounded, A, B = with_rounded_zeros(grid)
    assert are_zeros_codes(rounded.zero, 4)
    assert A.shape == (4, 64)
    assert B.shape == (12, 4)
    torch.testing.assert_close(rounded.dequantize() + B @ A, grid.dequantize(), atol=1e-5, rtol=1e-5)


def test_zeros_out_of_the_codes_are_seen():
    assert are_zeros_codes(torch.tensor([0.0, 15.0]), 4)
    for zero in (-1.0, 16.0, 7.5):
        assert not are_zeros_codes(torch.tensor([zero]), 4)
