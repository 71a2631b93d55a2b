"""The dither: uniform, white, and without a position that always falls to one side."""

import torch

from quantlayers_kernels.dither import white_noise


def test_noise_is_uniform_and_white():
    noise = white_noise(1 << 16, torch.device("cpu"))
    assert abs(noise.mean() - 0.5) < 0.01
    assert abs(noise.std() - 12**-0.5) < 0.01
    assert abs(torch.corrcoef(torch.stack([noise[:-1], noise[1:]]))[0, 1]) < 0.02


def test_the_first_positions_are_not_near_the_ends():
    noise = white_noise(16, torch.device("cpu"))
    assert ((noise > 1e-3) & (noise < 1 - 1e-3)).all()


def test_a_longer_noise_begins_as_the_shorter_one():
    assert torch.equal(white_noise(100, torch.device("cpu"))[:10], white_noise(10, torch.device("cpu")))
