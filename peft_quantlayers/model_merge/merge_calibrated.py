"""Merge adapters with a low output error on calibration data, block by block."""

from __future__ import annotations

from torch import Tensor

from ..calibration import BlockWork, Calibration, InputGroup, Visitor, walk
from ..calibration.asymmetric_targets import asymmetric_target
from ..calibration.finetune import finetune_block
from ..calibration.quantize_calibrated import wanted_statistics
from ..merging import MergePlan, MergeResult
from ..merging.merge_rules import requantize_as
from ..merging.planned_merge import LayerInputs, MergeRule
from ..merging.strategies import STRATEGIES, MergeStrategy
from .merge_targets import MergeTarget
from .prepared_merge import PreparedMerge


def merge_calibrated(merge: PreparedMerge, calibration: Calibration) -> None:
    """Merge the layers by the strategy's rules with data, what the data does not reach by its rule without.

    Args:
        merge: its adapters must be the active ones, and nothing be merged.
        calibration: the data.

    Raises:
        ValueError, TypeError: the data is refused, as by :meth:`Calibration.batches`.
    """
    called = {id(target.source.called_module()): target for target in merge.targets}
    layers = {name: called[id(module)] for name, module in merge.base_model.named_modules() if id(module) in called}
    assert len(layers) == len(merge.targets), "a layer to merge is not in the model"
    visitor = _MergeVisitor(layers, merge.names, calibration, STRATEGIES[merge.strategy])
    walk(merge.base_model, list(layers), calibration, visitor, progress=merge.progress)


class _MergeVisitor(Visitor):
    def __init__(
        self, layers: dict[str, MergeTarget], names: list[str], calibration: Calibration, strategy: MergeStrategy
    ) -> None:
        self.layers, self.names, self.calibration, self.strategy = layers, names, calibration, strategy
        self.needs_targets = calibration.finetune_epochs > 0
        self.statistics = wanted_statistics(calibration)
        self.hessians: dict[str, Tensor] = {}  # of this block, for the report after its finetuning

    def visit_group(self, group: InputGroup) -> None:
        hessian = None if group.experts is not None else group.hessian(self.calibration)
        for name in group.names:
            target = self.layers[name]
            target.source.merge_by(self._rule(target, group, hessian), self.names)
            report = target.source.merge_report
            is_changed = report is not None and (report.delta_norm > 0 or report.bits_after != report.bits_before)
            if self.needs_targets and hessian is not None and is_changed:
                self.hessians[name] = hessian

    def _rule(self, target: MergeTarget, group: InputGroup, hessian: Tensor | None) -> MergeRule:
        """For the outputs of each part, by what it reads; without data where it reads nothing."""
        is_stack, data_rule = group.experts is not None, self.strategy.data_rules[target.source.kind]

        def rule(plan: MergePlan) -> MergeResult:
            moment = group.hessian_of_expert(plan.part, self.calibration) if is_stack else hessian
            if moment is None:
                return self.strategy.unreached(plan) if target.spec is None else requantize_as(plan, target.spec)
            better = None if is_stack else asymmetric_target(plan.target, group.statistics)
            return data_rule(plan, target.spec or plan.weight.spec, LayerInputs(hessian=moment, target=better))

        return rule

    def finish_block(self, block: str, names: list[str], work: BlockWork) -> bool:
        """Finetune the merged layers only: unmerging would not restore norms or other layers."""
        changed = [self.layers[name].source for name in self.hessians]
        if not changed:
            return False
        finetune_block(
            work,
            epochs=self.calibration.finetune_epochs,
            learning_rate=self.calibration.learning_rate,
            layers=[source.quantized_base() for source in changed],
            norms=False,
        )
        for source, hessian in zip(changed, self.hessians.values(), strict=True):
            source.refresh_report(hessian)
        self.hessians.clear()
        return True
