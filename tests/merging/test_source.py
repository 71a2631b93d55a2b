"""A kind of adapter of a few lines gets applying and undoing its merge to the bit from its base class."""

from collections.abc import Sequence

import pytest
import torch
from every_method import METHODS, quick_spec
from torch import Tensor, nn

from peft_quantlayers import QuantizedLinear
from peft_quantlayers.merging import AdapterTraits, MergePlan, MergeSource, MergeState
from peft_quantlayers.merging.strategies import rules_for

RULES = rules_for("any delta")
pytestmark = pytest.mark.usefixtures("toy_method")


class Scaled(MergeSource):
    """Adapters that multiply the weight by a number, and count their merges."""

    kind = "any delta"

    def __init__(self, base: QuantizedLinear, factors: dict[str, float]) -> None:
        self.base: nn.Module = base
        self.factors = factors
        self.merged_adapters: list[str] = []
        self.merging = MergeState()
        self.note = "unmerged"

    def plan(self, names: Sequence[str], part: int = 0) -> MergePlan:
        weight = self.unmerged_weight()
        before = self.quantized_base().method.dequantize(weight)
        target = before
        for name in names:
            target = target * self.factors[name]
        return MergePlan(
            layer_name=self.quantized_base().layer_name,
            adapters=AdapterTraits(names=tuple(names)),
            weight=weight,
            before=before,
            target=target,
            tensors={"bias": self.unmerged_snapshot().tensors["bias"] + len(names)},
            compute_dtype=self.quantized_base().compute_dtype,
        )

    def current_base(self) -> nn.Module:
        return self.base

    def put_base(self, base: nn.Module) -> None:
        self.base = base

    def host_state(self) -> str:
        return self.note

    def set_host_state(self, state: str) -> None:
        self.note = state


def source_of(method: str = "hqq") -> Scaled:
    layer = QuantizedLinear.from_linear(nn.Linear(64, 48), quick_spec(method), layer_name="model.first")
    return Scaled(layer, {"half": 0.5, "triple": 3.0, "broken": float("nan")})


def bits_of(source: Scaled) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in source.base.state_dict().items()}


def assert_same_bits(source: Scaled, bits: dict[str, Tensor]) -> None:
    now = source.base.state_dict()
    assert now.keys() == bits.keys()
    assert all(now[name].dtype == bits[name].dtype and torch.equal(now[name], bits[name]) for name in bits)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", RULES)
def test_a_merge_is_applied_and_undone_to_the_bit(rule, method):
    source = source_of(method)
    base, bits, before = source.base, bits_of(source), source.base.dequantize()
    for _ in range(2):
        source.merge_by(RULES[rule], ["triple"])
        assert source.merged_adapters == ["triple"]
        torch.testing.assert_close(source.base.weight.norm(), 3 * before.norm(), rtol=0.1, atol=0)
        torch.testing.assert_close(source.base.bias, bits["bias"] + 1)
        assert source.merge_report.strategy == ("dense" if rule == "dense" else "requantize")
        assert source.merge_report.name == "model.first"
        assert isinstance(source.base, QuantizedLinear) == (rule != "dense")
        source.undo_merge()
        assert source.base is base
        assert_same_bits(source, bits)
        assert (source.merged_adapters, source.merge_report) == ([], None)
    source.undo_merge()  # of nothing
    assert_same_bits(source, bits)


def test_a_second_merge_takes_the_place_of_the_first():
    source, alone = source_of(), source_of()
    bits = bits_of(source)
    alone.base.load_state_dict(bits)
    for names in (["triple"], ["half"]):
        source.merge_by(RULES["requantize"], names)
    alone.merge_by(RULES["requantize"], ["half"])
    assert_same_bits(source, bits_of(alone))
    source.merge_by(RULES["dense"], ["half", "triple"])
    assert source.merged_adapters == ["half", "triple"]
    source.undo_merge()
    assert_same_bits(source, bits)


def test_a_snapshot_puts_every_state_back():
    source = source_of()
    snapshots, states = [], []
    for rule, names in ((None, []), ("requantize", ["triple"]), ("dense", ["half"])):
        if rule is not None:
            source.merge_by(RULES[rule], names)
            source.note = f"merged {names[0]}"
        snapshots.append(source.snapshot())
        states.append((source.base, bits_of(source), source.note, source.merge_report, list(source.merged_adapters)))
    for index in (0, 2, 1, 0, 1, 2):
        source.restore(snapshots[index])
        base, bits, note, report, names = states[index]
        assert source.base is base
        assert_same_bits(source, bits)
        assert (source.note, source.merge_report, source.merged_adapters) == (note, report, names)
        assert not source.is_written_by_others
    source.undo_merge()
    assert_same_bits(source, states[0][1])
    assert source.note == "unmerged"


def test_a_refused_merge_names_the_layer_and_leaves_what_was_merged():
    source = source_of()

    def refuse(plan: MergePlan) -> None:
        raise ValueError("no such merge.")

    source.merge_by(RULES["requantize"], ["triple"])
    bits, report = bits_of(source), source.merge_report
    for rule, names, message in (
        (refuse, ["half"], r"model\.first: no such merge"),
        (RULES["requantize"], ["broken"], r"model\.first"),
    ):
        with pytest.raises(ValueError, match=message):
            source.merge_by(rule, names)
        assert_same_bits(source, bits)
        assert (source.merged_adapters, source.merge_report) == (["triple"], report)


def test_a_write_from_elsewhere_is_noticed():
    source = source_of()
    source.merge_by(RULES["requantize"], ["triple"])
    assert not source.is_written_by_others
    source.base.weight.data.mul_(2)
    assert source.is_written_by_others
    source.forget_merge()
    assert not source.is_written_by_others
    assert source.merge_report is None


def test_a_base_that_shares_its_parameters_with_another_layer_does_not_write_into_them():
    source = source_of()
    twin = source_of().base
    twin._parameters.update(source.base._parameters)
    bits = bits_of(source)
    source.merging.shares_base = True
    source.merge_by(RULES["requantize"], ["triple"])
    assert all(torch.equal(twin.state_dict()[name], tensor) for name, tensor in bits.items())
    assert not torch.equal(source.base.dequantize(), twin.dequantize())
    source.undo_merge()
    assert_same_bits(source, bits)
    assert source.base.codes is twin.codes
