"""Merge adapters so that the outputs come out right on calibration data, block by block.

Rounding a weight with an adapter's change loses most of the change, which is smaller than a step. Chosen together
under the second moment of the layer's inputs, the codes of a row carry it: what one cannot express, others take over.
"""

from __future__ import annotations

import dataclasses

from peft import PeftModel
from torch import Tensor

from ..calibration import BlockWork, Calibration, Visitor, walk
from ..calibration.finetune import finetune_block
from ..formats import QuantizedWeight, QuantSpec
from ..quantizers import get_method
from .lora import LoraQuantizedLinear
from .report import LayerMergeReport
from .rules import MergePlan, append, extended_spec, requantize


def merge_calibrated(
    peft_model: PeftModel, names: list[str], calibration: Calibration, *, append: bool = False, progress: bool = True
) -> None:
    """Merge ``names`` into the quantized layers of ``peft_model`` that have one; they must be its active adapters.

    Args:
        append: extend the format of the weights, so that the change finds room in it.

    Raises:
        ValueError, TypeError: the data is refused, as by :meth:`Calibration.batches`, or a layer's spec cannot use it.
    """
    layers = {
        name: module
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraQuantizedLinear) and any(each in module.lora_A for each in names)
    }
    for name, layer in layers.items():
        spec = layer.quantized_base().spec
        if not get_method(spec.method).can_use_hessian(spec):
            raise ValueError(
                f'{name}: strategy="calibrated" is not possible for {spec}; HQQ needs axis=1. Use "requantize", '
                'or "keep" for plain LoRA. The model is left as it was.'
            )
        if append:
            extended_spec(spec, name=name)
    visitor = _MergeVisitor(layers, names, calibration, append)
    walk(peft_model, list(layers), calibration, visitor, progress=progress)


class _MergeVisitor(Visitor):
    def __init__(
        self, layers: dict[str, LoraQuantizedLinear], names: list[str], calibration: Calibration, append: bool
    ) -> None:
        self.layers, self.names, self.calibration, self.append = layers, names, calibration, append
        self.needs_targets = calibration.finetune_epochs > 0
        self.hessians: dict[str, Tensor] = {}  # of this block, for the report after its finetuning

    def visit(self, name: str, hessian: Tensor | None) -> None:
        layer = self.layers[name]
        kept: list[float] = []

        def rule(plan: MergePlan) -> QuantizedWeight:
            if hessian is None:
                return append(plan) if self.append else requantize(plan)
            spec = extended_spec(plan.weight.spec, name=name) if self.append else plan.weight.spec
            merged = for_outputs(plan, spec, hessian)
            kept.append(output_kept(plan, merged, hessian))
            return merged

        layer.merge_with(rule, self.names)
        if self.needs_targets and hessian is not None:
            self.hessians[name] = hessian
        if kept and isinstance(layer.merge_report, LayerMergeReport):
            layer.merge_report = dataclasses.replace(layer.merge_report, output_kept=kept[0])

    def finish_block(self, block: str, names: list[str], work: BlockWork) -> None:
        if self.calibration.finetune_epochs and names:
            finetune_block(
                work,
                epochs=self.calibration.finetune_epochs,
                learning_rate=self.calibration.learning_rate,
                norms=False,  # what unmerging does not put back stays as it is
            )
            for name in names:
                self._report_again(self.layers[name], self.hessians.pop(name, None))

    def _report_again(self, layer: LoraQuantizedLinear, hessian: Tensor | None) -> None:
        """Report on the finetuned weight, not on the one that was merged."""
        plan = layer.report_again()
        if hessian is not None and layer.merge_report is not None:
            kept = output_kept(plan, layer.quantized_base().quantized_weight, hessian)
            layer.merge_report = dataclasses.replace(layer.merge_report, output_kept=kept)


def for_outputs(plan: MergePlan, spec: QuantSpec, hessian: Tensor) -> QuantizedWeight:
    """The target quantized from the grid and the codes that the weight has, so that the outputs err least."""
    if not (plan.target - plan.before).any():
        return plan.weight
    base = plan.base
    return base.method.quantize(plan.target, spec, name=base.layer_name, hessian=hessian, start=plan.weight)


def output_kept(plan: MergePlan, merged: QuantizedWeight, hessian: Tensor) -> float:
    """Part of the energy of the outputs' change that is left: ``1 - |error|**2 / |change|**2`` under ``hessian``."""
    change, error = plan.target - plan.before, plan.base.method.dense(merged) - plan.target
    hessian = hessian.to(change.device)
    energy = float(((change @ hessian) * change).sum())
    return 1.0 - float(((error @ hessian) * error).sum()) / energy if energy > 0 else 1.0
