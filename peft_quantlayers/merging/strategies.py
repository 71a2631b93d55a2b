"""The strategies of merging, a registry: of each, its rule for every kind of adapter, and what it needs and does.

Besides its rule, a new strategy is an entry here, a name in ``Strategy`` and a sentence in ``merge_back``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from ..formats import QuantSpec
from ..methods import get_method
from . import merge_rules
from .calibrated_rule import append_for_outputs, calibrated
from .planned_merge import AdapterTraits, DataRule, MergeRule

Strategy = Literal["auto", "exact", "calibrated", "aware", "requantize", "append", "keep", "dense"]

# Kinds of adapters, by what is known of them: LoRA on a linear layer; on an expert; only the merged weight; only that
# of an embedding table, where often few rows change; the merged weight without rounding, of tuned scales.
Kind = Literal["lora", "expert", "any delta", "table", "exact weight"]


@dataclass(frozen=True, kw_only=True)
class LoraFacts:
    """What decides which strategies fit LoRA adapters on one layer.

    Fields:
        kind: "lora" or "expert".
        spec: of the layer's weight.
        is_plain: the delta is the product of two factors.
        has_bias: an adapter changes the bias (``lora_bias``), which merge-aware training does not support.
        is_qalora: the delta is constant in each group.
    """

    spec: QuantSpec
    kind: Kind = "lora"
    is_plain: bool = True
    has_bias: bool = False
    is_qalora: bool = False


@dataclass(frozen=True, kw_only=True)
class MergeStrategy:
    """One strategy.

    Fields:
        rules: by kind of adapter, how a plan is merged without data.
        data_rules: the same with data. A kind that is in neither does not support the strategy.
        unreached: with data, the rule of layers that it does not reach.
        check: raises ValueError or NotImplementedError where the rules would refuse, given what is known of the
            adapters, and what the merged weight will be stored as.
        adds_noise: the merge rounds codes other than as the adapters were trained.
        can_change_bits: the merged weight may be stored in another number of bits.
        form: what it makes of the form of a weight instead, for a message.
        fits: whether it is worth a recommendation for these LoRA adapters on this weight; None where all merge by it.
        advice: what it is, where it is recommended after another one lost much; in the order of the registry.
    """

    rules: Mapping[Kind, MergeRule] = field(default_factory=dict)
    data_rules: Mapping[Kind, DataRule] = field(default_factory=dict)
    unreached: MergeRule = merge_rules.requantize
    check: Callable[[AdapterTraits, QuantSpec], object] | None = None
    adds_noise: bool = True
    can_change_bits: bool = False
    form: str = ""
    fits: Callable[[LoraFacts], bool] | None = None
    advice: str | None = None

    def supports(self, kind: Kind) -> bool:
        """Whether adapters of this kind can be merged by it."""
        return kind in self.rules or kind in self.data_rules


def _can_be_extended(spec: QuantSpec) -> bool:
    try:
        spec.extended()
    except NotImplementedError:
        return False
    return True


_REQUANTIZE: dict[Kind, MergeRule] = {
    "lora": merge_rules.requantize,
    "expert": merge_rules.requantize,
    "any delta": merge_rules.requantize,
    "table": merge_rules.requantize_rows,
    "exact weight": merge_rules.exact,
}
STRATEGIES: dict[str, MergeStrategy] = {
    "auto": MergeStrategy(
        rules=_REQUANTIZE | {"lora": merge_rules.automatic, "expert": merge_rules.automatic}, can_change_bits=True
    ),
    "exact": MergeStrategy(
        rules={"lora": merge_rules.exact, "exact weight": merge_rules.exact},
        adds_noise=False,
        check=lambda adapters, spec: merge_rules.check_exact(adapters),
        fits=lambda facts: facts.is_qalora,
        form="keeps all codes, and folds the delta into the zeros",
        advice='strategy="exact", which rounds no code',
    ),
    "calibrated": MergeStrategy(
        data_rules={"lora": calibrated, "expert": calibrated},
        can_change_bits=True,
        fits=lambda facts: get_method(facts.spec.method).can_use_hessian(facts.spec),
        advice='strategy="calibrated" with some text',
    ),
    "aware": MergeStrategy(
        rules={"lora": merge_rules.merge_aware},
        adds_noise=False,
        check=lambda adapters, spec: merge_rules.check_merge_aware(adapters),
        fits=lambda facts: facts.is_plain and not facts.has_bias,
        form="keeps the grid that the adapters were trained for",
        advice='train with peft_quantlayers.enable_merge_aware and merge with strategy="aware"',
    ),
    "requantize": MergeStrategy(rules=_REQUANTIZE, can_change_bits=True),
    "append": MergeStrategy(
        rules={"lora": merge_rules.append, "expert": merge_rules.append},
        data_rules={"lora": append_for_outputs, "expert": append_for_outputs},
        unreached=merge_rules.append,
        check=lambda adapters, spec: merge_rules.extended_spec(spec),
        fits=lambda facts: _can_be_extended(facts.spec),
        form="extends each layer's format by one more codebook",
        advice='strategy="append", which costs one more bit per weight',
    ),
    "keep": MergeStrategy(
        rules={"lora": merge_rules.keep, "expert": merge_rules.keep},
        adds_noise=False,
        check=lambda adapters, spec: merge_rules.check_keep(adapters),
        fits=lambda facts: facts.is_plain,
        form="keeps all codes, and the adapter beside them",
        advice='strategy="keep", which saves the adapter as a low-rank branch and loses nothing',
    ),
    "dense": MergeStrategy(
        rules=dict.fromkeys(get_args(Kind), merge_rules.dense), adds_noise=False, form="makes a float model"
    ),
}


def rules_for(kind: Kind) -> dict[str, MergeRule]:
    """By the name of the strategy, the rules that merge adapters of a kind without data."""
    return {name: strategy.rules[kind] for name, strategy in STRATEGIES.items() if kind in strategy.rules}


def fitting_strategies(facts: LoraFacts) -> tuple[str, ...]:
    """Strategies that fit LoRA adapters on a layer, besides "requantize" and "dense", which fit all."""
    fits = {name: strategy.fits for name, strategy in STRATEGIES.items() if strategy.supports(facts.kind)}
    return tuple([name for name, fit in fits.items() if fit is not None and fit(facts)])
