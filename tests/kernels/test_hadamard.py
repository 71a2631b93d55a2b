"""Rotations by Hadamard matrices: orthogonal, exact inverses, differentiable, and the same in every version."""

import hashlib

import pytest
import torch

from quantlayers_kernels.hadamard import hadamard, rotate, rotate_back, rotation_block

# Widths of models, and numbers that have a Hadamard matrix for a part of them only, or for none.
BLOCKS = {
    **{size: size for size in (4, 16, 64, 96, 576, 960, 1536, 3072, 4096, 8960, 14336, 28672)},
    **{11008: 256, 18944: 18944, 1000: 1000, 36: 36, 60: 60, 44: 44, 68: 68, 52: 4, 13824: 13824, 172: 4},
    **{2: 0, 6: 0, 7: 0, 1: 0, 1226: 0},
}


@pytest.mark.parametrize("size", BLOCKS)
def test_the_largest_block_that_divides_a_row_is_rotated(size: int) -> None:
    assert rotation_block(size) == BLOCKS[size]


@pytest.mark.parametrize("size", [4, 36, 96, 172, 576, 1536])
def test_a_rotation_is_orthogonal_and_spreads_each_channel_over_its_block(size: int) -> None:
    matrix = rotate(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64))
    block = rotation_block(size)
    blocks = matrix.view(size // block, block, size // block, block)
    for i in range(size // block):
        torch.testing.assert_close(blocks[i, :, i].abs(), torch.full((block, block), block**-0.5, dtype=torch.float64))
    assert int((matrix != 0).sum()) == size * block


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rotating_back_gives_the_numbers_again(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    turned = rotate(x)
    assert turned.dtype == dtype
    assert turned.is_contiguous()
    assert turned.data_ptr() != x.data_ptr()
    back = rotate_back(turned)
    assert back.dtype == dtype
    torch.testing.assert_close(back, x, atol=8 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize(
    ("size", "digest"), [(12, "5a305f64628a9976"), (64, "13e86a8c0179274e"), (576, "63b4519b68eadcef")]
)
def test_a_rotation_never_changes(size: int, digest: str) -> None:
    """Weights that were quantized in its basis would be others."""
    positive = rotate(torch.eye(size, dtype=torch.float64)) > 0
    assert hashlib.sha256(bytes(positive.flatten().byte().tolist())).hexdigest()[:16] == digest


def test_gradients_of_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(rotate, (x,))
    assert torch.autograd.gradcheck(rotate_back, (x,))
    assert torch.autograd.gradgradcheck(lambda x: rotate(x).square(), (x,))


def test_autocast_rounds_nothing() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = rotate(x)
        wanted = rotate(x.requires_grad_())
    assert torch.equal(inside, rotate(x.detach()))
    assert torch.equal(wanted, inside)


def test_views_and_empty_inputs() -> None:
    x = torch.randn(6, 4, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(x.transpose(0, 1)), rotate(x).transpose(0, 1))
    assert rotate(x[:0]).shape == (0, 4, 24)


def test_compiled_it_is_one_operator() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(torch.ops.quantlayers.rotate.default, (x.requires_grad_(), False))
    compiled = torch.compile(lambda x: rotate(x) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), rotate(x) + 1)


def test_hadamard_matrices_have_orthogonal_rows_of_ones() -> None:
    for size in (1, 2, 4, 12, 20, 28, 36, 44, 576):
        found = hadamard(size)
        assert found is not None
        assert torch.equal(found.abs(), torch.ones_like(found))
        assert torch.equal(found @ found.t(), size * torch.eye(size, dtype=torch.float64))
    assert hadamard(6) is None
    assert hadamard(92) is None
