"""How much of a delta is left in a layer's outputs: against the numbers by hand, and without touching the layer."""

import pytest
import torch
from lora.test_layer import assert_same_bits, bits_of, quantized_two, with_adapter

from peft_quantlayers.merging.strategies import rules_for
from peft_quantlayers.model_merge.merge_targets import merge_targets
from peft_quantlayers.model_merge.output_retention import OutputRetention, watched


def test_batches_add_up_to_least_squares_over_all_of_them():
    base, delta, noise = (torch.randn(6, 5, dtype=torch.float64) for _ in range(3))
    merged = base + 0.75 * delta + 0.1 * noise
    whole, parts = OutputRetention(), OutputRetention()
    whole.add(base, base + delta, merged)
    for rows in (slice(0, 1), slice(1, 6)):
        parts.add(base[rows], (base + delta)[rows], merged[rows])
    moved = merged - base
    expected = float((moved * delta).sum() / delta.square().sum())
    for found in (whole, parts):
        assert found.retained == pytest.approx(expected, rel=1e-5)
        assert found.noise == pytest.approx(float((moved - expected * delta).norm() / delta.norm()), rel=1e-3)
    nothing = OutputRetention()
    nothing.add(base, base, base)
    assert (nothing.retained, nothing.noise) == (1.0, 0.0)


@pytest.mark.parametrize("rule", ["requantize", "dense", "keep"])
@pytest.mark.parametrize("fails", [False, True])
def test_watching_a_forward_pass_writes_to_no_layer_and_leaves_no_hook(rule, fails):
    model = with_adapter(quantized_two(nbits=3)).eval()
    targets = merge_targets(model, ["default"])
    assert len(targets) == 2
    snapshots = []
    for target in targets:
        target.source.merge_by(rules_for("lora")[rule], ["default"])
        snapshots.append(target.source.snapshot())
        target.source.undo_merge()
    x = torch.randn(5, 64)
    bases = [target.source.current_base() for target in targets]
    writes = [base.n_writes for base in bases]
    pointers = [[parameter.data_ptr() for parameter in base.parameters()] for base in bases]
    seen: list[list[int]] = []
    bases[1].register_forward_hook(lambda *args: seen.append([base.n_writes for base in bases]))
    bits = bits_of(model)

    retentions = [OutputRetention() for _ in targets]
    with torch.no_grad():
        expected = model(x)
        seen.clear()
        try:
            with watched(zip(targets, snapshots, retentions, strict=True)):
                assert torch.equal(model(x), expected)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
    assert seen
    assert all(each == writes for each in [*seen, [base.n_writes for base in bases]])
    assert [target.source.current_base() for target in targets] == bases
    assert [[parameter.data_ptr() for parameter in base.parameters()] for base in bases] == pointers
    assert_same_bits(model, bits)
    assert not any(target.module._forward_hooks for target in targets)
    assert all(target.source.merging.unmerged is None for target in targets)

    energies = [retention.energy for retention in retentions]
    model(x)
    assert [retention.energy for retention in retentions] == energies
    for retention in retentions:
        if rule == "requantize":
            assert retention.retained == pytest.approx(1.0, abs=0.2)
            assert retention.noise > 0.01
        else:
            assert (retention.retained, retention.noise) == pytest.approx((1.0, 0.0), abs=1e-3)
