"""The strategies of merging, a registry: of each, its rule for every kind of adapter, and what it needs and does.

Besides its rule, a new strategy is an entry here, a name in ``Strategy`` and a sentence in ``merge_back``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from ..formats import QuantSpec
from ..methods import get_method
from . import merge_rules as rules
from .planned_merge import MergeRule

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
        rules: by kind of adapter, how a plan is merged without data; a kind that is missing does not support it.
        takes_calibration: the merge may use data; without a rule, it must.
        rounds: the merge rounds codes other than as the adapters were trained, which adds noise.
        fits: whether it is worth a recommendation for these LoRA adapters on this weight; None where all merge by it.
        form: what it makes of the form of a weight, for a message; None if it can give it other bits.
        advice: what it is, where it is recommended after another one lost much; in the order of the registry.
    """

    rules: Mapping[Kind, MergeRule] = field(default_factory=dict)
    takes_calibration: bool = False
    rounds: bool = True
    fits: Callable[[LoraFacts], bool] | None = None
    form: str | None = None
    advice: str | None = None


def _can_be_extended(spec: QuantSpec) -> bool:
    try:
        spec.extended()
    except NotImplementedError:
        return False
    return True


_REQUANTIZE: dict[Kind, MergeRule] = {
    "lora": rules.requantize,
    "expert": rules.requantize,
    "any delta": rules.requantize,
    "table": rules.requantize_rows,
    "exact weight": rules.exact,
}
STRATEGIES: dict[str, MergeStrategy] = {
    "auto": MergeStrategy(rules=_REQUANTIZE | {"lora": rules.automatic, "expert": rules.automatic}),
    "exact": MergeStrategy(
        rules={"lora": rules.exact, "exact weight": rules.exact},
        rounds=False,
        fits=lambda facts: facts.is_qalora,
        form="keeps all codes, and folds the delta into the zeros",
        advice='strategy="exact", which rounds no code',
    ),
    "calibrated": MergeStrategy(
        takes_calibration=True,
        fits=lambda facts: get_method(facts.spec.method).can_use_hessian(facts.spec),
        advice='strategy="calibrated" with some text',
    ),
    "aware": MergeStrategy(
        rules={"lora": rules.merge_aware},
        rounds=False,
        fits=lambda facts: facts.is_plain and not facts.has_bias,
        form="keeps the grid that the adapters were trained for",
        advice='train with peft_quantlayers.enable_merge_aware and merge with strategy="aware"',
    ),
    "requantize": MergeStrategy(rules=_REQUANTIZE),
    "append": MergeStrategy(
        rules={"lora": rules.append, "expert": rules.append},
        takes_calibration=True,
        fits=lambda facts: _can_be_extended(facts.spec),
        form="extends each layer's format by one more codebook",
        advice='strategy="append", which costs one more bit per weight',
    ),
    "keep": MergeStrategy(
        rules={"lora": rules.keep, "expert": rules.keep},
        rounds=False,
        fits=lambda facts: facts.is_plain,
        form="keeps all codes, and the adapter beside them",
        advice='strategy="keep", which saves the adapter as a low-rank branch and loses nothing',
    ),
    "dense": MergeStrategy(rules=dict.fromkeys(get_args(Kind), rules.dense), rounds=False, form="makes a float model"),
}


def rules_for(kind: Kind) -> dict[str, MergeRule]:
    """By the name of the strategy, the rules that merge adapters of a kind without data."""
    return {name: strategy.rules[kind] for name, strategy in STRATEGIES.items() if kind in strategy.rules}


def fitting_strategies(facts: LoraFacts) -> tuple[str, ...]:
    """Strategies that fit LoRA adapters on a layer, besides "requantize" and "dense", which fit all."""
    fits = {
        name: strategy.fits
        for name, strategy in STRATEGIES.items()
        if facts.kind in strategy.rules or not strategy.rules
    }
    return tuple([name for name, fit in fits.items() if fit is not None and fit(facts)])
