"""What ``merge_back`` was asked for, checked: all that is refused is refused here, before any layer is changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn

from ..arguments import check_callable, check_flag, check_tokenizer
from ..bit_allocation import BitPlan
from ..calibration import Calibration
from ..merging.strategies import Strategy
from .active_adapters import only_active
from .held_out_calls import HeldOutBatch, held_out_batches
from .merge_budget import merge_plan_of, planned_targets
from .merge_targets import MergeTarget, merge_targets
from .refused_merges import (
    checked_names,
    refuse_arguments,
    refuse_biases_without_a_place,
    refuse_broken_adapters,
    refuse_other_models,
    refuse_rules,
    refuse_targets,
    refuse_tied_weights,
    refuse_to_stay_loaded,
    refuse_weights_elsewhere,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedMerge:
    """A merge whose arguments are all accepted.

    Fields:
        peft_model: the model, unchanged so far.
        targets: its layers to merge, with what the plan says of them.
        names: of the adapters.
        calibration: the data, for a merge; None without any.
        plan: of the merged layers' bits; None where they keep theirs.
        held_out: what ``evaluate_on`` gave, as batches; None without it.
        strategy, tune_epochs, metric, progress: as for :func:`.merge_back`.
    """

    peft_model: PeftModel
    targets: Sequence[MergeTarget]
    names: list[str]
    strategy: Strategy
    calibration: Calibration | None
    plan: BitPlan | None
    tune_epochs: int
    held_out: Sequence[HeldOutBatch] | None
    metric: Callable[[nn.Module], float] | None
    progress: bool

    @property
    def base_model(self) -> nn.Module:
        """The model inside PEFT's wrapper, with its adapter layers."""
        return self.peft_model.get_base_model()

    def only_its_adapters(self) -> AbstractContextManager[None]:
        """A context in which exactly the adapters of this merge are active; what is merged stays merged."""
        return only_active(self.peft_model, self.targets, self.names)


def prepared_merge(
    peft_model: PeftModel,
    *,
    strategy: Strategy,
    adapters: list[str] | None,
    calibration: Any,
    tokenizer: Any,
    budget: Any,
    tune_epochs: int,
    evaluate_on: Any,
    metric: Callable[[nn.Module], float] | None,
    unload: bool,
    progress: bool,
) -> PreparedMerge:
    """The merge that these arguments of :func:`.merge_back` ask for; raises what that documents. Changes nothing."""
    refuse_other_models(peft_model)
    refuse_arguments(strategy, calibration, tune_epochs, has_budget=budget is not None)
    check_tokenizer(tokenizer)
    check_callable("metric", metric, "a model")
    for flag, value in (("unload", unload), ("progress", progress)):
        check_flag(flag, value)
    refuse_weights_elsewhere(peft_model)
    names = checked_names(peft_model, adapters)
    refuse_broken_adapters(peft_model, names)
    refuse_biases_without_a_place(peft_model, names)
    refuse_tied_weights(peft_model)
    found = merge_targets(peft_model, names)
    targets = [target for target in found if not target.is_left_to_owner]
    refuse_targets(found, targets, names, strategy, needs_unmerged=evaluate_on is not None)
    if not unload:
        refuse_to_stay_loaded(peft_model, targets)
    held_out = None if evaluate_on is None else held_out_batches(peft_model.get_base_model(), evaluate_on)
    data = None if calibration is None else Calibration.of(calibration, tokenizer).of_merge()
    plan = None
    if budget is not None:
        plan = merge_plan_of(peft_model, targets, names, budget, data, strategy=strategy, progress=progress)
        targets = planned_targets(peft_model, targets, plan)
    refuse_rules(targets, names, strategy, has_data=data is not None)
    return PreparedMerge(
        peft_model=peft_model,
        targets=targets,
        names=names,
        strategy=strategy,
        calibration=data,
        plan=plan,
        tune_epochs=tune_epochs,
        held_out=held_out,
        metric=metric,
        progress=progress,
    )
