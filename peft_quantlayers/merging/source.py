"""Where plans come from: a layer with adapters, of whatever kind, that can be merged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from ..layers import QuantizedLinear
from ..layers.quantize_weight import named_errors
from .layer_report import LayerMergeReport, layer_report
from .plan import MergePlan, MergeResult, MergeRule
from .state import MergeState


class MergeSource(ABC):
    """A layer whose adapters can be merged into it, and taken back to the bit.

    Attributes:
        merging: what is merged, and the way back.
        merge_rules: the rules that its adapters can be merged by, by strategy; "calibrated" needs data and is not
            here.
    """

    merging: MergeState
    merge_rules: ClassVar[Mapping[str, MergeRule]]

    @abstractmethod
    def plan(self, names: Sequence[str]) -> MergePlan:
        """The merge of the adapters ``names``, in the place of what is merged now. Changes nothing.

        Raises:
            ValueError: the merged weight is not finite.
        """

    def merge_by(self, rule: MergeRule, names: Sequence[str]) -> None:
        """Merge exactly these adapters by ``rule``, in the place of what was merged before.

        Raises:
            ValueError, NotImplementedError: what the plan or the rule refuses, with the layer's name; the layer is
                left as it was.
        """
        with torch.no_grad(), named_errors(self.merging.base.layer_name):
            plan = self.plan(names)
            result = rule(plan)
        self.apply_merge(plan, result)

    def apply_merge(self, plan: MergePlan, result: MergeResult) -> None:
        """Make the layer what ``result`` says, and report on it."""
        with torch.no_grad():
            report = layer_report(plan, result)
            self.merging.apply(plan, result, report)

    @property
    def is_mergeable(self) -> bool:
        """Whether there is a quantized weight to merge into. Others are PEFT's to merge."""
        return isinstance(self.merging.base, QuantizedLinear)

    @property
    def merge_report(self) -> LayerMergeReport | None:
        """What the last merge did to this layer; None while nothing is merged."""
        return self.merging.report

    def refresh_report(self) -> MergePlan:
        """Renew the report after the merged weight was tuned, and return the plan of the merge."""
        strategy = "calibrated" if self.merging.report is None else self.merging.report.strategy
        with torch.no_grad():
            plan = self.plan(list(self.merging.host.merged_adapters))
            result = MergeResult(strategy=strategy, weight=self.merging.base.quantized_weight)
            self.merging.report = layer_report(plan, result)
        return plan
