"""Bits under a budget for a merge: the planner that users call, what a budget is refused for, and a plan's specs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from peft import PeftModel

from ..arguments import check_choice, check_flag, check_tokenizer
from ..bit_allocation import BitPlan
from ..bit_allocation.quantizing_under_budget import given_plan, wanted_budget
from ..calibration import Calibration
from ..formats import QuantSpec
from ..layers import QuantizedLinear
from ..merging import MergeSource
from ..merging.strategies import STRATEGIES
from .merge_costs import fitted, planned
from .merge_targets import MergeTarget, merge_targets
from .refused_merges import checked_names, refuse_broken_adapters, refuse_other_models, refuse_weights_elsewhere

# Those that can write a weight of other bits.
STRATEGIES_WITH_BUDGET = tuple(name for name, strategy in STRATEGIES.items() if strategy.can_change_bits)


def plan_merge_bits(
    peft_model: PeftModel,
    calibration: Any,
    *,
    average: float | None = None,
    size: int | str | None = None,
    choices: Sequence[int | Mapping[str, Any]] | None = None,
    strategy: str = "calibrated",
    adapters: list[str] | None = None,
    tokenizer: Any = None,
    progress: bool = True,
) -> BitPlan:
    """Plan which layers get more bits than others in the merge of adapters, so that it changes the predictions least.

    As :func:`plan_bits`, of the unmerged model: each layer's quantized weight plus the adapters' delta is merged in
    every form, and what that costs is estimated by the Fisher information of the model with its adapters. Planned are
    the linear layers with one of the adapters; all others keep their bits, and so do experts and embedding tables.

    Args:
        peft_model: a PEFT model on a quantized base, not merged.
        calibration: as in :func:`quantize_model`.
        average: stored bits per weight of the layers that are planned, scales and other metadata included.
        size: bytes of all tensors of the merged model, or text with a unit ("4GB").
        choices: forms that a layer may take: fields of its spec that differ, or numbers (of ``nbits``, or for AQLM of
            ``num_codebooks``). None for 2, 3 and 4 bits, or 1 to 3 codebooks.
        strategy: how the layers will be merged: "calibrated", or "requantize" without data ("auto").
        adapters: names of the adapters to merge; None for the active ones.
        tokenizer: for texts, unless ``calibration`` is a :class:`Calibration`.
        progress: show progress bars.

    Returns:
        The plan, for ``merge_back(budget=plan)``.

    Raises:
        TypeError, ValueError: as :func:`plan_bits`; adapters or a strategy that merge_back(budget=...) refuses. The
            model was not changed.
    """
    refuse_other_models(peft_model)
    check_flag("progress", progress)
    check_tokenizer(tokenizer)
    check_choice("strategy", strategy, STRATEGIES_WITH_BUDGET)
    refuse_weights_elsewhere(peft_model)
    names = checked_names(peft_model, adapters)
    refuse_broken_adapters(peft_model, names)
    targets = merge_targets(peft_model, names)
    data = Calibration.of(calibration, tokenizer).of_merge()
    refuse_budget(peft_model, targets, names, strategy)
    sources, budget = planned_sources(peft_model, targets), {"average": average, "size": size}
    return planned(
        peft_model, targets, sources, names, data, budget, strategy=strategy, choices=choices, progress=progress
    )


def merge_plan_of(
    peft_model: PeftModel,
    targets: Sequence[MergeTarget],
    names: list[str],
    budget: Any,
    calibration: Calibration | None,
    *,
    strategy: str,
    progress: bool,
) -> BitPlan:
    """``budget`` itself if it is a plan or the file of one, or a plan for that many bits per weight or that size.

    Raises:
        TypeError, ValueError: as :func:`.bit_allocation.quantizing_under_budget.plan_of`. Nothing was changed.
    """
    refuse_budget(peft_model, targets, names, strategy)
    if (plan := given_plan(budget)) is not None:
        return plan
    wanted = wanted_budget(budget, is_calibrated=calibration is not None)
    sources, data = planned_sources(peft_model, targets), cast(Calibration, calibration)
    return planned(
        peft_model, targets, sources, names, data, wanted, strategy=strategy, choices=None, progress=progress
    )


def refuse_budget(peft_model: PeftModel, targets: Sequence[MergeTarget], names: list[str], strategy: str) -> None:
    """Raise ValueError where a merge has no bits to plan: it keeps the codes' number, or the weight's form."""
    if strategy not in STRATEGIES_WITH_BUDGET:
        raise ValueError(
            f"budget= chooses other bits for merged layers, and strategy={strategy!r} "
            f'{STRATEGIES[strategy].form}. Use "calibrated" or "requantize", or leave budget out. The model is left '
            "as it was."
        )
    for target in targets:
        source = target.source
        if target.module.merged:
            raise ValueError(
                f"{target.name}: {list(target.module.merged_adapters)} are merged already, and bits are planned by "
                "what the unmerged model predicts. Call unmerge_adapter() first. The model is left as it was."
            )
        if source.kind == "exact weight":
            raise ValueError(
                f"{target.name}: tuned scales merge exactly into the bits that they were tuned for. Leave budget out. "
                "The model is left as it was."
            )
        aware = sorted(source.traits(names).trained_merge_aware)
        if strategy == "auto" and aware:
            raise ValueError(
                f"{target.name}: {aware} were trained through the rounding of these very bits, and with others they "
                'compute something else. Leave budget out, or merge with strategy="calibrated". The model is left as '
                "it was."
            )
    if not planned_sources(peft_model, targets):
        raise ValueError(
            f"budget= is for adapters on quantized linear layers, and {names} lie on none. The model is left as it "
            "was."
        )
    qalora = [name for name in names if getattr(peft_model.peft_config[name], "use_qalora", False)]
    if strategy == "auto" and qalora:
        raise ValueError(
            f'{qalora} are QA-LoRA, which "auto" merges exactly, without rounding a code. Leave budget out, or merge '
            'with strategy="calibrated" or "requantize". The model is left as it was.'
        )


def planned_targets(peft_model: PeftModel, targets: Sequence[MergeTarget], plan: BitPlan) -> list[MergeTarget]:
    """``targets``, with what the merged weights of those that ``plan`` names are stored as.

    Raises:
        ValueError: the plan wants other bits of a layer that is not merged, or fields that its method does not have,
            or that do not fit its shape. Nothing was changed.
    """
    sources = planned_sources(peft_model, targets)
    modules = dict(peft_model.get_base_model().named_modules())
    specs: dict[int, QuantSpec] = {}
    for name in plan.layers:
        fields = plan.overrides.get(name, {})
        module: Any = modules.get(name)
        base = sources[name].quantized_base() if name in sources else module
        if not isinstance(base, QuantizedLinear):
            if fields:
                raise ValueError(
                    f"the plan names {name!r}, which is no quantized linear layer of this model. Plan its bits with "
                    "plan_merge_bits. The model is left as it was."
                )
            continue
        spec = fitted(base, fields)
        if spec is None or (name not in sources and spec != base.spec):
            why = "do not fit its shape" if spec is None else "are not its own, and it has no adapter to merge"
            raise ValueError(
                f"{name}: the plan's {fields} {why}. Plan the bits with plan_merge_bits, for the adapters that are "
                "merged. The model is left as it was."
            )
        if name in sources:
            specs[id(sources[name])] = spec
    return [replace(target, spec=specs.get(id(target.source))) for target in targets]


def planned_sources(peft_model: PeftModel, targets: Sequence[MergeTarget]) -> dict[str, MergeSource]:
    """The layers whose bits a merge may change, by name in the base model."""
    ours = {id(target.module): target.source for target in targets if target.source.can_change_bits}
    modules = peft_model.get_base_model().named_modules()
    return {name: ours[id(module)] for name, module in modules if id(module) in ours}
