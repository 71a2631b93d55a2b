"""Our HQQ solver against the ``hqq`` package: the same weights, the same settings.

The package differs from our solver in three ways, and each is held apart here: it stops all groups of a matrix at
once (so it is run to its last step as well, without the stop), where the shrink is at work it gives the zero after the
last step, which it never evaluated (we give the best of those before), and its ``HQQLinear`` rounds the first zero at
4 bits.
"""

import functools
from dataclasses import dataclass

import pytest
import torch
from demo_model import demo_model_folder
from hqq.core.optimize import optimize_weights_proximal_legacy_step, shrink_lp_op
from hqq.core.quantize import Quantizer
from safetensors import safe_open
from torch import Tensor

from peft_quantlayers import HQQSpec
from peft_quantlayers.methods import get_method

GROUP_SIZE = 64
ITERS, BETA, LP_NORM = 20, 10.0, 0.7
REAL = ("model.layers.3.self_attn.q_proj.weight", "model.layers.20.mlp.down_proj.weight")


@functools.cache
def weight(name: str) -> Tensor:
    torch.manual_seed(0)
    if name == "gaussian":
        return torch.randn(256, 256) * 0.02
    if name == "student-t":
        return torch.distributions.StudentT(4.0).sample((256, 256)) * 0.02
    with safe_open(str(demo_model_folder() / "model.safetensors"), "pt") as file:
        return file.get_tensor(name)[:, :576].clone()


weights = pytest.mark.parametrize(
    "name", ["gaussian", "student-t", *(pytest.param(name, marks=pytest.mark.real_model) for name in REAL)]
)
widths = pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
axes = pytest.mark.parametrize("axis", [0, 1])


def by_group(matrix: Tensor, axis: int) -> Tensor:
    """(n_groups, group_size), in the order of the package's scales."""
    return matrix.reshape(-1, GROUP_SIZE) if axis == 1 else matrix.reshape(GROUP_SIZE, -1).t()


@dataclass
class LastStep:
    """The package's solution after all iterations. ``is_shrunk``: groups where the shrink was ever at work."""

    dense: Tensor
    steps_per_unit: Tensor
    is_shrunk: Tensor


@functools.cache
def run_package_to_its_last_step(name: str, nbits: int, axis: int) -> LastStep:
    """``Quantizer.quantize`` without rounding the first zero and without the early stop, its own step function."""
    matrix = weight(name)
    groups = matrix.reshape(-1, GROUP_SIZE) if axis == 1 else matrix.reshape(GROUP_SIZE, -1)
    low, high = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
    max_code = 2**nbits - 1
    scale = (max_code / (high - low)).clamp(max=2e4)
    zero = -low * scale
    is_shrunk = torch.zeros_like(zero, dtype=torch.bool)
    for _ in range(ITERS):
        W_r, _, zero, scale = optimize_weights_proximal_legacy_step(
            groups, scale, zero, [0, max_code], BETA, LP_NORM, axis
        )
        is_shrunk |= shrink_lp_op(groups - W_r, BETA, LP_NORM).ne(0).any(axis, keepdim=True)
    codes = torch.round(groups * scale + zero).clamp(0, max_code)
    dense = ((codes - zero) / scale).reshape(matrix.shape)
    return LastStep(dense=dense, steps_per_unit=scale.flatten(), is_shrunk=is_shrunk.flatten())


def run_package(matrix: Tensor, nbits: int, axis: int, *, round_zero: bool) -> Tensor:
    """The weight that the package makes of ``matrix``, early stop and all."""
    W_q, meta = Quantizer.quantize(
        matrix, nbits=nbits, group_size=GROUP_SIZE, axis=axis, round_zero=round_zero, device="cpu"
    )
    return Quantizer.dequantize(W_q, meta | {"compute_dtype": torch.float32}).clone()


@functools.cache
def run_ours(name: str, nbits: int, axis: int) -> Tensor:
    spec = HQQSpec(
        nbits=nbits,
        group_size=GROUP_SIZE,
        axis=axis,
        scale_dtype="float32",
        round_zero=False,
        refine_scale=False,
        iters=ITERS,
        beta=BETA,
        lp_norm=LP_NORM,
        kappa=1.0,  # the release reads kappa and never applies it
    )
    method = get_method("hqq")
    return method.dequantize(method.quantize(weight(name), spec))


@pytest.fixture(autouse=True, scope="module")
def _forget():
    """What several tests look at is computed once, and not kept any longer."""
    yield
    for cached in (weight, run_package_to_its_last_step, run_ours):
        cached.cache_clear()


def steps_apart(ours: Tensor, theirs: Tensor, steps_per_unit: Tensor, axis: int) -> Tensor:
    """The largest difference within each group, in code steps."""
    return (by_group(ours, axis) - by_group(theirs, axis)).abs().amax(1) * steps_per_unit


@axes
@widths
@weights
def test_groups_without_shrink_end_where_the_package_ends(name: str, nbits: int, axis: int) -> None:
    """Equal to 1e-4 of a step: both end at the same fixed point, and differ by the rounding of float32 there.

    Exception: a code that a rounding tie decides may differ, and the group then ends elsewhere. None of the random
    groups does; of the real ones, whose weights lie on a grid of 16 values, at most 0.1 % (8 bits; 0.03 % at 4).
    """
    last = run_package_to_its_last_step(name, nbits, axis)
    apart = steps_apart(run_ours(name, nbits, axis), last.dense, last.steps_per_unit, axis)[~last.is_shrunk]
    n_apart = int((apart > 1e-4).sum())
    assert n_apart <= (2e-3 * apart.numel() if name in REAL else 0)


@axes
@pytest.mark.parametrize("nbits", [3, 2, 1])
@pytest.mark.real_model
@pytest.mark.parametrize("name", REAL)
def test_groups_with_shrink_have_the_absolute_error_of_the_package(name: str, nbits: int, axis: int) -> None:
    """By the measure that the package watches, the mean |error|: never more at 3 and 2 bits.

    At 1 bit 20 steps are not enough to settle, and its zero of after the last step is better: up to 0.33 %.
    """
    matrix = weight(name)
    last = run_package_to_its_last_step(name, nbits, axis)
    assert last.is_shrunk.any()
    ours, theirs = (
        by_group(dense - matrix, axis)[last.is_shrunk].abs().mean(1)
        for dense in (run_ours(name, nbits, axis), last.dense)
    )
    assert ours.sum() <= theirs.sum() * (1.004 if nbits == 1 else 1)


# Groups that end elsewhere than in the package as it is. Its early stop bites on 8 bits of real weights with axis=1;
# at 2 bits and 1 it is the shrink, which large real weights wake. Measured: 0.1615, 0.3137, 0.5752.
ENDS_ELSEWHERE = {8: 0.18, 4: 0.002, 3: 0.002, 2: 0.35, 1: 0.65}


@axes
@widths
@weights
def test_total_error_is_not_larger_than_that_of_the_package(name: str, nbits: int, axis: int) -> None:
    """Absolute and squared error, summed over the groups that the shrink leaves alone.

    Over all groups, the real ones at 3, 2 and 1 bits included, which the shrink reaches: at most 0.4 % more absolute
    and 1.2 % more squared error, both at 1 bit.
    """
    matrix = weight(name)
    ours, theirs = run_ours(name, nbits, axis), run_package(matrix, nbits, axis, round_zero=False)
    last = run_package_to_its_last_step(name, nbits, axis)
    ends_elsewhere = steps_apart(ours, theirs, last.steps_per_unit, axis) > 1e-3
    assert ends_elsewhere.float().mean() <= (ENDS_ELSEWHERE[nbits] if name in REAL else 0.001)

    for measure, allowed in ((torch.abs, 1.004), (torch.square, 1.012)):
        mine, peers = (measure(by_group(dense - matrix, axis)).sum(1) for dense in (ours, theirs))
        assert mine[~last.is_shrunk].sum() <= peers[~last.is_shrunk].sum() * (1 + 2e-5)
        assert mine.sum() <= peers.sum() * (allowed if last.is_shrunk.any() else 1 + 2e-5)


@axes
@weights
def test_four_bits_have_a_smaller_error_than_the_layer_of_the_package(name: str, axis: int) -> None:
    """Its HQQLinear starts 4 bits from a rounded zero, and ends in a worse minimum: 1 % to 3 % more squared error."""
    matrix = weight(name)
    ours, theirs = run_ours(name, 4, axis), run_package(matrix, 4, axis, round_zero=True)
    assert (ours - matrix).square().sum() < 0.99 * (theirs - matrix).square().sum()
