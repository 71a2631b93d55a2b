"""Dithered codes against float64: right on average, on grids that rise or fall, within the range of codes."""

import pytest
import torch
from torch import Tensor

from peft_quantlayers.methods.dithered_codes import PATTERN_ROWS, dithered_codes
from quantlayers_kernels.dither import white_noise

MAX_CODE = 15
SHAPE = (24, 48)
SCALES = {"rising": 0.05, "falling": -0.05}


def random_codes(shape: tuple[int, int] = SHAPE, *, away: int = 0) -> Tensor:
    """Codes at least ``away`` from both ends."""
    return torch.randint(away, MAX_CODE + 1 - away, shape, dtype=torch.uint8)


def uniform(scale: Tensor | float):
    return lambda codes: codes.float() * scale - 0.3


def levels(scale: float):
    """Values of growing distance, as those of NF4 outside of its middle."""
    table = scale * torch.linspace(0.5, 2, MAX_CODE + 1).cumsum(0)
    return lambda codes: table[codes.long()]


def merged(codes: Tensor, delta: Tensor, values, first_row: int = 0) -> Tensor:
    return dithered_codes(codes, delta, values, max_code=MAX_CODE, first_row=first_row)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("first_row", [0, PATTERN_ROWS - 5])
def test_each_code_is_that_of_float64(scale, first_row):
    scale = scale * (1 + torch.rand(SHAPE[0], 1))
    codes, delta = random_codes(), 0.1 * torch.randn(SHAPE)
    found = merged(codes, delta, uniform(scale), first_row)
    assert found.dtype == codes.dtype

    position = (codes + delta.double() / scale.double()).clamp(0, MAX_CODE)
    lower = position.floor()
    noise = white_noise(PATTERN_ROWS * SHAPE[1], torch.device("cpu")).view(PATTERN_ROWS, SHAPE[1]).double()
    noise = noise[(first_row + torch.arange(SHAPE[0])) % PATTERN_ROWS]
    expected = lower + (noise < position - lower)
    # Where float32 may decide otherwise: the noise is as large as the fraction, or as a rounding error of it.
    is_certain = ((noise - (position - lower)).abs() > 1e-3) & (noise > 1e-3) & (noise < 1 - 1e-3)
    assert is_certain.double().mean() > 0.98
    assert torch.equal(found[is_certain].double(), expected[is_certain])


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("make_values", [uniform, levels])
def test_the_mean_of_many_merges_is_the_delta(make_values, scale):
    values, codes = make_values(scale), random_codes(away=3)
    delta = 0.1 * abs(scale) * torch.randn(SHAPE)  # nearest codes would lose it
    total = torch.zeros(SHAPE, dtype=torch.float64)
    for first_row in range(PATTERN_ROWS):  # each row meets each row of the noise once
        total += (values(merged(codes, delta, values, first_row)) - values(codes)).double()
    error = (total / PATTERN_ROWS - delta) / abs(scale)
    # A mean of 256 draws between two codes has a deviation of at most step / 32; steps are two scales at most.
    assert error.square().mean().sqrt() < 2 / 32
    assert error.square().mean().sqrt() < 0.4 * (delta / scale).square().mean().sqrt()
    assert error.mean().abs() < 0.005


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("make_values", [uniform, levels])
def test_targets_out_of_range_get_the_last_code(make_values, scale):
    values, codes, far = make_values(scale), random_codes(), torch.full(SHAPE, 1e3)
    up, down = (0, MAX_CODE) if scale < 0 else (MAX_CODE, 0)
    assert torch.equal(merged(codes, far, values), torch.full_like(codes, up))
    assert torch.equal(merged(codes, -far, values), torch.full_like(codes, down))


def test_codes_without_a_delta_stay_and_one_of_a_whole_step_moves_by_one():
    codes, delta, values = random_codes(away=1), torch.zeros(SHAPE), uniform(0.0625)  # exact in float32
    assert torch.equal(merged(codes, delta, values), codes)
    delta[::2, 1::3] = 0.0625
    expected = codes + (delta > 0).to(codes.dtype)
    assert ((merged(codes, delta, values) - expected).abs() > 0).float().mean() < 0.01
    assert torch.equal(merged(codes, delta, values)[delta == 0], codes[delta == 0])


def test_a_group_without_a_scale_stays_worth_what_it_was():
    scale = torch.full((SHAPE[0], 1), 0.05)
    scale[5] = 0
    codes, values = random_codes(), uniform(scale)
    found = merged(codes, torch.randn(SHAPE), values)
    assert int(found.max()) <= MAX_CODE
    assert torch.equal(values(found)[5], values(codes)[5])
    # Every code of that row has the value of every other, and yet without a delta none of them changes.
    assert torch.equal(merged(codes, torch.zeros(SHAPE), values), codes)


def test_ranges_of_rows_get_the_codes_of_the_whole():
    codes, delta, values = random_codes(), 0.02 * torch.randn(SHAPE), uniform(0.05)
    whole = merged(codes, delta, values, first_row=250)
    parts = [merged(codes[a:b], delta[a:b], values, first_row=250 + a) for a, b in ((0, 7), (7, 8), (8, SHAPE[0]))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(merged(codes, delta, values, first_row=0), whole)
