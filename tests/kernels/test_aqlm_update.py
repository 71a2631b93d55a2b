"""Moving AQLM codes along a small delta: it arrives on average, whichever way it is computed."""

import pytest
import torch
from conftest import COMPILED

from quantlayers_kernels.aqlm import update
from quantlayers_kernels.aqlm.reference import dequantize_aqlm_reference
from quantlayers_kernels.aqlm.update import nearest_entries, updated_codes

# num_codebooks, bits, (out_group, in_group)
SCHEMES = {"2x8": (2, 8, (1, 8)), "1x12": (1, 12, (1, 8)), "3x4 g2x4": (3, 4, (2, 4)), "2x1 g5": (2, 1, (1, 5))}


def weight_of(scheme: str, n_out: int = 96, n_in: int = 24) -> tuple[torch.Tensor, ...]:
    num_codebooks, bits, (out_group, in_group) = SCHEMES[scheme]
    generator = torch.Generator().manual_seed(0)
    size = 2**bits
    codes = torch.randint(-size // 2, max(1, size // 2), (n_out, n_in, num_codebooks), generator=generator)
    codebooks = torch.randn(num_codebooks, size, out_group, in_group, generator=generator)
    scales = torch.rand(n_out, 1, 1, 1, generator=generator) + 0.5
    return codes.to(torch.int8 if bits <= 8 else torch.int16), codebooks.half(), scales.half()


def low_rank(weight: tuple[torch.Tensor, ...], size: float) -> torch.Tensor:
    codes, codebooks, _ = weight
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(codes.shape[0] * codebooks.shape[2], 4, generator=generator)
    return size * left @ torch.randn(4, codes.shape[1] * codebooks.shape[3], generator=generator)


@pytest.mark.parametrize("kernels", COMPILED, indirect=True)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_compiled_kernel_moves_the_same_codes(scheme, kernels, monkeypatch):
    weight = weight_of(scheme)
    delta = low_rank(weight, 0.05)
    compiled = updated_codes(*weight, lambda rows: delta[rows])
    monkeypatch.setattr(update, "can_dequantize", lambda *tensors: False)
    plain = updated_codes(*weight, lambda rows: delta[rows])
    assert (compiled != plain).float().mean() < 1e-3  # ties up to float32 rounding
    assert (compiled != weight[0]).any()


@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_change_arrives_on_average_and_none_moves_no_code(is_compiled, monkeypatch):
    if not is_compiled:
        monkeypatch.setattr(update, "can_dequantize", lambda *tensors: False)
    weight = weight_of("2x8", n_out=2048, n_in=64)
    delta = low_rank(weight, 0.02)
    moved = updated_codes(*weight, lambda rows: delta[rows])
    codes, *grid = weight
    arrived = dequantize_aqlm_reference(moved, *grid) - dequantize_aqlm_reference(codes, *grid)
    assert (arrived * delta).sum() / delta.square().sum() == pytest.approx(1.0, abs=0.05)
    assert ((moved != codes).sum(-1) <= 1).all()
    assert torch.equal(updated_codes(*weight, lambda rows: torch.zeros_like(delta[rows])), codes)


@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_change_longer_than_the_steps_arrives(is_compiled, monkeypatch):
    """The last of many codebooks holds short steps: they cost little for what they bring, but bring too little."""
    if not is_compiled:
        monkeypatch.setattr(update, "can_dequantize", lambda *tensors: False)
    codes, _, scales = weight_of("2x8", n_out=512, n_in=64)
    codebooks = torch.randn(2, 256, 1, 8) * torch.tensor([1.0, 0.05])[:, None, None, None]
    delta = low_rank((codes, codebooks, scales), 0.05)
    moved = updated_codes(codes, codebooks, scales, lambda rows: delta[rows])
    arrived = dequantize_aqlm_reference(moved, codebooks, scales) - dequantize_aqlm_reference(codes, codebooks, scales)
    assert (arrived * delta).sum() / delta.square().sum() == pytest.approx(1.0, abs=0.05)


def test_large_codebooks_are_searched_cell_by_cell(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    codebooks = torch.randn(1, 2**13, 1, 4, generator=generator)
    codebooks[:, ::2] *= 0.1  # cells of very different size
    found = nearest_entries(codebooks)[0].long()
    distances = (codebooks[0, :, 0][found] - codebooks[0]).square().sum(2)
    monkeypatch.setattr(update, "MAX_WHOLE_SEARCH", 2**13)
    nearest = nearest_entries(codebooks)[0].long()
    least = (codebooks[0, :, 0][nearest] - codebooks[0]).square().sum(2)
    assert all(len(set(row)) == update.NEIGHBOURS for row in found.tolist())
    assert (distances[:, 0] == 0).all()  # itself
    assert (distances.sum(1) / least.sum(1)).mean() < 1.2


def test_rows_are_moved_alike_in_one_tile_and_in_many(set_tile_elements):
    weight = weight_of("3x4 g2x4")
    delta = low_rank(weight, 0.1)
    whole = updated_codes(*weight, lambda rows: delta[rows])
    set_tile_elements(6 * delta.shape[1])
    assert torch.equal(updated_codes(*weight, lambda rows: delta[rows]), whole)


def test_codebooks_with_equal_entries_are_left_alone():
    codes, codebooks, scales = weight_of("2x8")
    codebooks[:] = codebooks[:, :1].clone()
    delta = low_rank((codes, codebooks, scales), 0.1)
    assert torch.equal(updated_codes(codes, codebooks, scales, lambda rows: delta[rows]), codes)
