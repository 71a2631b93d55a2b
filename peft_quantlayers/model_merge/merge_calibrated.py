"""Merge adapters with a low output error on calibration data, block by block."""

from __future__ import annotations

from torch import Tensor

from ..calibration import BlockWork, Calibration, InputGroup, Visitor, walk
from ..calibration.asymmetric_targets import asymmetric_target
from ..calibration.finetune import finetune_block
from ..calibration.quantize_calibrated import wanted_statistics
from ..layers.quantize_weight import named_errors
from ..merging import MergePlan, MergeResult
from ..merging.calibrated_rule import for_outputs
from ..merging.merge_rules import append, extended_spec, rule_into
from ..merging.planned_merge import MergeRule
from ..methods import get_method
from .prepared_merge import PreparedMerge
from .targets import MergeTarget


def merge_calibrated(merge: PreparedMerge, calibration: Calibration) -> None:
    """Merge the layers by the strategy "calibrated", or "append" to extend the format of the weights for the delta.

    Args:
        merge: its sources can be calibrated; its adapters must be the active ones.
        calibration: the data.

    Raises:
        ValueError, TypeError: the data is refused, as by :meth:`Calibration.batches`, or a layer's spec cannot use it.
        NotImplementedError: "append", and a format cannot be extended.
    """
    called = {id(target.source.called_module()): target for target in merge.targets}
    layers = {name: called[id(module)] for name, module in merge.base_model.named_modules() if id(module) in called}
    for name, target in layers.items():
        spec = target.spec or target.source.quantized_base().spec
        method = get_method(spec.method)
        if merge.strategy == "append":
            with named_errors(name):
                extended_spec(spec)
        if not method.can_use_hessian(spec):
            raise ValueError(
                f"{name}: strategy={merge.strategy!r} with calibration data is not possible for {spec}. "
                f'{method.calibration_requirement} Or merge with "requantize", or "keep" for plain LoRA. The model is '
                "left as it was."
            )
    visitor = _MergeVisitor(layers, merge.names, calibration, is_extended=merge.strategy == "append")
    walk(merge.base_model, list(layers), calibration, visitor, progress=merge.progress)


class _MergeVisitor(Visitor):
    def __init__(
        self, layers: dict[str, MergeTarget], names: list[str], calibration: Calibration, *, is_extended: bool
    ) -> None:
        self.layers, self.names, self.calibration, self.is_extended = layers, names, calibration, is_extended
        self.needs_targets = calibration.finetune_epochs > 0
        self.statistics = wanted_statistics(calibration)
        self.hessians: dict[str, Tensor] = {}  # of this block, for the report after its finetuning

    def visit_group(self, group: InputGroup) -> None:
        hessian = None if group.experts is not None else group.hessian(self.calibration)
        for name in group.names:
            self.layers[name].source.merge_by(self._rule(name, group, hessian), self.names)

    def _rule(self, name: str, group: InputGroup, hessian: Tensor | None) -> MergeRule:
        """For the outputs of each part, by what it reads; without data where it reads nothing."""
        planned, is_stack = self.layers[name].spec, group.experts is not None

        def rule(plan: MergePlan) -> MergeResult:
            moment = group.hessian_of_expert(plan.part, self.calibration) if is_stack else hessian
            if moment is None:
                return append(plan) if self.is_extended else rule_into(planned)(plan)
            own = planned or plan.weight.spec
            asymmetric = None if is_stack else asymmetric_target(plan.target, group.statistics)
            weight = for_outputs(plan, extended_spec(own) if self.is_extended else own, moment, asymmetric)
            if self.needs_targets and not is_stack and weight is not plan.weight:
                self.hessians[name] = moment
            return MergeResult(strategy="append" if self.is_extended else "calibrated", weight=weight, hessian=moment)

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
