"""The kernels for all experts at once, against the definition in float64; they need a CPU with AMX."""

import pytest
import torch

from quantlayers_kernels import native
from quantlayers_kernels.bitpack import pack
from quantlayers_kernels.hqq import experts
from quantlayers_kernels.hqq.reference import dequantize_hqq_reference

needs_tiles = pytest.mark.skipif(not native.has_matrix_tiles(), reason="this CPU, or its system, has no AMX")
# No tokens, one, half a tile and more, whole tiles, and more than one block of them.
COUNTS = [3, 0, 1, 16, 70, 37, 128]
SHAPES = [(32, 64, 32), (96, 768, 64), (64, 320, 32), (64, 160, 160)]


def stack(nbits: int, out_features: int, in_features: int, group_size: int, dtype=torch.float16):
    generator = torch.Generator().manual_seed(nbits * in_features)
    leading, n_groups = (len(COUNTS), out_features), in_features // group_size
    codes = torch.randint(0, 2**nbits, (*leading, in_features), dtype=torch.uint8, generator=generator)
    W_q = pack(codes.flatten(0, 1), nbits).view(*leading, -1)
    scale = torch.rand(*leading, n_groups, generator=generator).add(0.5).mul(0.02).to(dtype)
    zero = torch.rand(*leading, n_groups, generator=generator).mul(2**nbits).to(dtype)
    return W_q, scale, zero


def dense(tensors, nbits: int, in_features: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The experts' weights, rounded to ``dtype``, float64."""
    parts = zip(*tensors, strict=True)
    weights = [dequantize_hqq_reference(*each, nbits=nbits, axis=1, in_features=in_features) for each in parts]
    return [weight.to(dtype).double() for weight in weights]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@needs_tiles
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("out_features", "in_features", "group_size"), SHAPES)
def test_products_and_gradients_err_no_more_than_plain_bfloat16(out_features, in_features, group_size, nbits, dtype):
    tensors = stack(nbits, out_features, in_features, group_size, dtype)
    x, grad = (torch.randn(sum(COUNTS), n).bfloat16() for n in (in_features, out_features))
    assert experts.can_use(x, *tensors, nbits=nbits, axis=1, in_features=in_features)
    y = experts.linear(x, *tensors, COUNTS, nbits=nbits)
    grad_x = experts.input_gradient(grad, *tensors, COUNTS, nbits=nbits, in_features=in_features)
    exact, rounded = (dense(tensors, nbits, in_features, each) for each in (torch.float64, torch.bfloat16))
    for found, given, turn in ((y, x, True), (grad_x, grad, False)):
        parts = given.split(COUNTS)
        truth, plain = (
            [
                part @ (weight.t() if turn else weight).to(part.dtype)
                for part, weight in zip(parts, weights, strict=True)
            ]
            for parts, weights in (([part.double() for part in parts], exact), (parts, rounded))
        )
        assert error(found, torch.cat(truth)) <= 2 * error(torch.cat(plain), torch.cat(truth))
        assert torch.isfinite(found).all()


@needs_tiles
def test_threads_and_other_users_of_the_tiles_change_nothing():
    tensors = stack(4, 96, 768, 64)
    x = torch.randn(sum(COUNTS), 768).bfloat16()
    expected = experts.linear(x, *tensors, COUNTS, nbits=4)
    before, n_threads = x[:64] @ x[:64].t(), torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(experts.linear(x, *tensors, COUNTS, nbits=4), expected)
            assert torch.equal(x[:64] @ x[:64].t(), before)  # BLAS multiplies bfloat16 in the same registers
    finally:
        torch.set_num_threads(n_threads)


@needs_tiles
def test_other_sizes_and_dtypes_are_left_to_the_caller():
    tensors, x = stack(4, 96, 768, 64), torch.randn(4, 768).bfloat16()

    def can(x, tensors, **fields):
        return experts.can_use(x, *tensors, **{"nbits": 4, "axis": 1, "in_features": 768} | fields)

    assert can(x, tensors)
    assert not can(x.float(), tensors)
    assert not can(x, tensors, axis=0)
    assert not can(x, stack(8, 96, 768, 64), nbits=8)
    assert not can(x, stack(4, 96, 768, 16))
    assert not can(x, stack(4, 90, 768, 64))
    assert not can(x[:, :720], stack(4, 96, 720, 72), in_features=720)
    assert not can(x, (tensors[0], tensors[1].double(), tensors[2].double()))
    for counts in ([4], [*COUNTS[:-1], 1], [-1, *COUNTS[1:-1], 132]):
        with pytest.raises(ValueError, match="do not fit the counts"):
            experts.linear(torch.randn(sum(COUNTS), 768).bfloat16(), *tensors, counts, nbits=4)
