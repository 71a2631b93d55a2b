"""The rules of merging as functions of a plan: tensors in, a quantized weight out, and nothing else changes."""

import copy
import dataclasses

import pytest
import torch
from every_method import METHODS, all_methods, methods_for, quick_spec
from plans import SHAPE, plan_of

from peft_quantlayers import HQQSpec
from peft_quantlayers.layers import LowRankBranch
from peft_quantlayers.merging import AdapterTraits, MergePlan, MergeResult, merge_rules
from peft_quantlayers.merging.coefficients import retained_fraction
from peft_quantlayers.merging.strategies import LoraFacts, fitting_strategies, rules_for

RULES = rules_for("lora")
pytestmark = pytest.mark.usefixtures("toy_method")
AWARE = AdapterTraits(names=("default",), is_merge_aware=True, trained_merge_aware=("default",))


def retained(plan: MergePlan, result: MergeResult) -> float:
    return retained_fraction(plan.before, plan.target, result.merged(plan))


def same_tensors(found, expected) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def plan_for(rule: str, method: str) -> MergePlan:
    """A plan that ``rule`` can merge."""
    spec = quick_spec(method)
    if rule == "aware":
        return plan_of(spec, size=0.2, adapters=AWARE)
    if rule != "exact":
        return plan_of(spec, size=0.2)
    groups = 0.001 * torch.randn(SHAPE[0], SHAPE[1] // 16)
    return plan_of(spec, delta=groups.repeat_interleave(16, 1), group_delta=groups)


@pytest.mark.parametrize(("rule", "method"), [(rule, method) for rule in RULES for method in methods_for(rule)])
def test_a_rule_retains_the_delta_and_changes_no_argument(rule, method):
    plan = plan_for(rule, method)
    before = copy.deepcopy(plan)
    result = RULES[rule](plan)
    assert result.strategy == ("requantize" if rule == "auto" else rule)
    # One more codebook of 16 vectors holds a part of the delta; rounding adds noise to all of it.
    tolerance = {"exact": 0.02, "keep": 1e-4, "dense": 1e-4, "append": 0.5}.get(rule, 0.25)
    assert retained(plan, result) == pytest.approx(1.0, abs=tolerance)
    if result.weight is not None:
        result.weight.check("first")
    assert same_tensors(plan.weight.tensors, before.weight.tensors)
    assert torch.equal(plan.target, before.target)
    assert torch.equal(plan.before, before.before)


@all_methods
def test_without_a_delta_every_bit_stays(method):
    plan = plan_of(quick_spec(method), delta=torch.zeros(SHAPE), adapters=AWARE)
    names = ["auto", "aware", "requantize"] + ["append"] * (method in methods_for("append"))
    for name in names:
        assert same_tensors(RULES[name](plan).weight.tensors, plan.weight.tensors), name


@all_methods
def test_on_grid_is_the_merge_of_the_method_and_what_merge_aware_training_computes(method):
    plan = plan_of(quick_spec(method), adapters=AWARE)
    expected = plan.method.merged(plan.weight, lambda rows: plan.left[rows] @ plan.right)
    assert same_tensors(merge_rules.on_grid(plan).tensors, expected.tensors)
    assert same_tensors(merge_rules.merge_aware(plan).weight.tensors, expected.tensors)


def test_the_automatic_rule_takes_what_the_adapters_were_trained_for():
    spec = quick_spec("hqq")
    assert merge_rules.automatic(plan_of(spec, adapters=AWARE)).strategy == "aware"
    assert merge_rules.automatic(plan_for("exact", "hqq")).strategy == "exact"
    assert merge_rules.automatic(plan_of(spec)).strategy == "requantize"
    known = plan_of(spec).weight
    result = merge_rules.automatic(plan_of(spec, exact=known))
    assert (result.strategy, result.weight is known) == ("exact", True)


def test_adapters_that_were_trained_merge_aware_elsewhere_are_named_once(caplog):
    merge_rules._warn_of_other_rounding.cache_clear()
    adapters = AdapterTraits(names=("default",), trained_merge_aware=("default",))
    for _ in range(2):
        assert merge_rules.automatic(plan_of(quick_spec("hqq"), adapters=adapters)).strategy == "requantize"
    assert caplog.text.count("['default'] were trained merge-aware") == 1


def test_a_delta_that_leaves_the_range_of_codes_gets_a_new_grid():
    plan = plan_of(HQQSpec(nbits=3, group_size=16), size=30.0)
    result = merge_rules.requantize(plan)
    assert not torch.equal(result.weight.tensors["scale"], plan.weight.tensors["scale"])
    assert retained(plan, result) == pytest.approx(1.0, abs=0.05)
    on_grid = MergeResult(strategy="on grid", weight=merge_rules.on_grid(plan))
    assert retained(plan, on_grid) < 0.5


@pytest.mark.parametrize(
    ("rule", "method", "error", "message"),
    [
        ("exact", "hqq", ValueError, r"\['default'\] cannot be merged exactly.*requantize"),
        ("aware", "hqq", ValueError, r"\['default'\] were not trained merge-aware.*requantize"),
        *(
            ("append", method, NotImplementedError, 'cannot be extended.*"keep" holds')
            for method in METHODS
            if method not in methods_for("append")
        ),
    ],
)
def test_what_a_rule_cannot_merge_is_refused_with_the_way_out(rule, method, error, message):
    with pytest.raises(error, match=message):
        RULES[rule](plan_of(quick_spec(method)))


def test_a_delta_that_is_no_product_cannot_be_kept_as_a_branch():
    with pytest.raises(NotImplementedError, match="plain LoRA and rsLoRA"):
        merge_rules.keep(plan_of(quick_spec("hqq"), factors=False))


def test_the_way_out_of_a_refusal_is_one_that_the_adapters_can_take():
    for strategies, expected, missing in (
        (("aware", "keep"), '"keep" loses nothing', '"dense"'),
        ((), '"dense" loses nothing', "enable_merge_aware"),
    ):
        adapters = AdapterTraits(names=("default",), strategies=strategies)
        with pytest.raises(ValueError, match=expected) as caught:
            merge_rules.merge_aware(plan_of(quick_spec("hqq"), adapters=adapters))
        assert missing not in str(caught.value)


@pytest.mark.parametrize("method", methods_for("append"))
def test_an_appended_codebook_leaves_those_that_there_are_as_long_as_they_serve(method):
    plan = plan_of(quick_spec(method), size=0.2)
    result = merge_rules.append(plan)
    assert result.weight.spec == plan.weight.spec.extended()
    errors = [(each.merged(plan) - plan.target).norm() for each in (result, merge_rules.requantize(plan))]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_has_the_layers_dtype_and_its_branch_within(dtype):
    branch = LowRankBranch(torch.randn(2, SHAPE[1]), 0.01 * torch.randn(SHAPE[0], 2))
    plan = plan_of(quick_spec("hqq"), compute_dtype=dtype, branch=branch)
    result = merge_rules.dense(plan)
    assert result.is_new_layer
    assert result.dense.dtype == dtype
    assert torch.equal(result.dense, (plan.target + branch.dense()).to(dtype))
    assert result.bits_per_weight == 8 * dtype.itemsize
    torch.testing.assert_close(result.merged(plan), plan.target, rtol=0, atol=2e-3 if dtype != torch.float32 else 1e-6)


def test_keep_leaves_the_codes_and_puts_its_factors_behind_those_of_the_layer():
    spec = quick_spec("hqq")
    plan = plan_of(spec)
    result = merge_rules.keep(plan)
    assert result.weight is plan.weight
    assert result.branch.rank == 4
    torch.testing.assert_close(result.merged(plan), plan.target)
    branch_bits = 32 * 4 * sum(SHAPE) / (SHAPE[0] * SHAPE[1])
    assert result.bits_per_weight == pytest.approx(plan.weight.bits_per_weight + branch_bits)

    own = LowRankBranch(torch.randn(2, SHAPE[1]), 0.01 * torch.randn(SHAPE[0], 2))
    both = merge_rules.keep(plan_of(spec, branch=own))
    assert both.branch.rank == 6
    torch.testing.assert_close(both.branch.dense(), own.dense() + plan.delta, rtol=1e-4, atol=1e-6)
    half = merge_rules.keep(plan_of(spec, adapters=AdapterTraits(names=("default",), dtype=torch.bfloat16)))
    assert half.branch.A.dtype == half.branch.B.dtype == torch.bfloat16


@all_methods
def test_strategies_are_named_for_the_adapters_that_they_fit(method):
    of_weight = {name for name in ("calibrated", "append") if method in methods_for(name)}
    for fields, of_adapter in (
        ({}, {"aware", "keep"}),
        ({"has_bias": True}, {"keep"}),
        ({"kind": "expert"}, {"keep"}),
        ({"is_plain": False, "is_qalora": True}, {"exact"}),
        ({"is_plain": False}, set()),
    ):
        facts = LoraFacts(spec=quick_spec(method), **fields)
        assert set(fitting_strategies(facts)) == of_weight | of_adapter


def test_rows_of_the_delta_are_those_of_the_factors_or_of_the_difference():
    plan = plan_of(quick_spec("hqq"))
    rows = slice(5, 9)
    assert torch.equal(plan.delta_rows(rows), plan.left[rows] @ plan.right)
    without = dataclasses.replace(plan, left=None, right=None)
    assert torch.equal(without.delta_rows(rows), plan.target[rows] - plan.before[rows])
