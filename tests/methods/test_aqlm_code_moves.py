"""Moving AQLM codes down a gradient: few groups, towards lower loss, within the trust ratio."""

import dataclasses

import pytest
import torch

from peft_quantlayers.formats import QuantizedWeight
from peft_quantlayers.methods import AQLMMethod, AQLMSpec, move_aqlm_codes
from peft_quantlayers.methods.aqlm.code_moves import moved_codes, scaled_gradient

SPECS = [
    AQLMSpec(nbits_per_codebook=4),
    AQLMSpec(nbits_per_codebook=4, num_codebooks=1, in_group_size=4),
    AQLMSpec(nbits_per_codebook=9, num_codebooks=3, in_group_size=4, out_group_size=2),
]


def quantized(spec: AQLMSpec) -> QuantizedWeight:
    weight = 0.02 * torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    return AQLMMethod().quantize(weight, spec)


def dense(weight: QuantizedWeight) -> torch.Tensor:
    return AQLMMethod().dequantize(weight)


def gradient_of(seed: int) -> torch.Tensor:
    return torch.randn(64, 96, generator=torch.Generator().manual_seed(seed)) ** 3


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("step", [0.1, 1.0, 10.0])
def test_moves_lower_the_linear_loss_and_keep_both_bounds(spec, step):
    weight, gradient = quantized(spec), gradient_of(1)
    before = {name: tensor.clone() for name, tensor in weight.tensors.items()}
    moved, n_changed = move_aqlm_codes(weight, gradient, step=step, max_change=0.05, trust_ratio=0.1)
    assert all(torch.equal(weight.tensors[name], before[name]) for name in before)
    codes = moved.tensors["codes"]
    assert (codes.dtype, codes.shape) == (before["codes"].dtype, before["codes"].shape)
    changed = (codes != before["codes"]).any(-1)
    assert int(changed.sum()) == n_changed <= 0.05 * changed.numel()
    assert n_changed > 0 or step == 0.1

    old, new = dense(weight), dense(moved)
    assert (new - old).norm() <= 0.1 * old.norm() * (1 + 1e-5)
    eta = step * old.norm() / gradient.norm()
    promised = (new - old).square().sum() / (2 * eta)
    assert ((new - old) * gradient).sum() <= -promised * (1 - 1e-4)


def test_the_groups_with_the_largest_gradient_move_and_no_others():
    spec = SPECS[0]
    weight, gradient = quantized(spec), 1e-3 * gradient_of(2)
    gradient.view(64, 12, 8)[5, 3] = 10.0
    gradient.view(64, 12, 8)[17, 0] = -10.0
    moved, n_changed = move_aqlm_codes(weight, gradient, step=0.2, max_change=2 / 768, trust_ratio=1.0)
    assert n_changed == 2
    assert (moved.tensors["codes"] != weight.tensors["codes"]).any(-1).nonzero().tolist() == [[5, 3], [17, 0]]


def test_a_single_codebook_gives_the_best_entry_for_the_wish():
    spec = SPECS[1]
    weight, gradient = quantized(spec), gradient_of(3)
    old = dense(weight)
    moved, _ = move_aqlm_codes(weight, gradient, step=0.5, max_change=1.0, trust_ratio=1.0)
    target = (old - 0.5 * old.norm() / gradient.norm() * gradient).view(64, 24, 1, 4)
    codebooks, scales = (weight.tensors[name].float() for name in ("codebooks", "scales"))
    candidates = codebooks[0, :, 0] * scales.view(64, 1, 1, 1)
    best = (target - candidates).square().sum(-1).argmin(-1)
    assert torch.equal(moved.codes()[..., 0], best)


def test_a_tighter_trust_ratio_moves_less():
    spec, distances = SPECS[0], []
    weight, gradient = quantized(spec), gradient_of(4)
    for trust_ratio in (0.1, 0.3, 1.0):
        moved, _ = move_aqlm_codes(weight, gradient, step=3.0, max_change=0.2, trust_ratio=trust_ratio)
        old, new = dense(weight), dense(moved)
        distances.append(float((new - old).norm() / old.norm()))
        assert distances[-1] <= trust_ratio * (1 + 1e-5)
    assert 0 < distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("case", ["zero gradient", "zero scales", "no group"])
def test_nothing_moves_where_nothing_can(case):
    weight, gradient = quantized(SPECS[0]), gradient_of(5)
    if case == "zero gradient":
        gradient = torch.zeros_like(gradient)
    if case == "zero scales":
        zeros = torch.zeros_like(weight.tensors["scales"])
        weight = dataclasses.replace(weight, tensors=weight.tensors | {"scales": zeros})
    max_change = 1e-4 if case == "no group" else 0.1
    moved, n_changed = move_aqlm_codes(weight, gradient, step=1.0, max_change=max_change, trust_ratio=1.0)
    assert n_changed == 0
    assert torch.equal(moved.tensors["codes"], weight.tensors["codes"])


def test_the_result_is_a_new_tensor_even_where_nothing_moves():
    codes = torch.zeros(2, 2, 1, dtype=torch.int64)
    moved = moved_codes(
        codes, torch.ones(1, 2, 1, 2), torch.ones(2), torch.zeros(2, 4), step=1.0, max_change=1.0, trust_ratio=1.0
    )
    assert moved.data_ptr() != codes.data_ptr()


def test_a_scaled_gradient_is_as_large_in_rows_and_columns_of_large_and_of_small_numbers():
    signs = gradient_of(6).sign()
    rows, columns = torch.logspace(-15, 3, 64)[:, None], torch.logspace(-3, 3, 96)
    torch.testing.assert_close(scaled_gradient(signs * rows * columns), signs, rtol=1e-3, atol=1e-3)
    assert scaled_gradient(torch.zeros(3, 4)).eq(0).all()
    without_a_column = gradient_of(6).index_fill(1, torch.tensor([2]), 0.0)
    assert torch.isfinite(scaled_gradient(without_a_column)).all()


def test_an_outlying_column_takes_all_moves_unless_the_gradient_is_scaled():
    weight, gradient = quantized(SPECS[0]), gradient_of(7)
    gradient[:, 8:16] *= 1e4  # the inputs of one group of columns
    shares = []
    for is_scaled in (False, True):
        options = {"step": 1.0, "max_change": 0.05, "trust_ratio": 1.0, "is_scaled": is_scaled}
        moved, n_changed = move_aqlm_codes(weight, gradient, **options)
        changed = (moved.tensors["codes"] != weight.tensors["codes"]).any(-1)
        shares.append(float(changed[:, 1].sum()) / n_changed)
    assert shares[0] == 1
    assert shares[1] < 0.3
