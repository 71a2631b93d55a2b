"""Merge adapters so that the outputs come out right on calibration data, block by block.

Rounding a weight with an adapter's change loses most of the change, which is smaller than a step. Chosen together
under the second moment of the layer's inputs, the codes of a row carry it: what one cannot express, others take over.
What still does not arrive is asked for again.
"""

from __future__ import annotations

import dataclasses
import math

from peft import PeftModel
from torch import Tensor

from ..calibration import BlockWork, Calibration, InputStatistics, Visitor, walk
from ..calibration.finetune import finetune_block
from ..formats import QuantizedWeight, QuantSpec
from ..lora.layer import LoraQuantizedLinear
from ..merging.report import LayerMergeReport, change_coefficient, coefficient
from ..merging.rules import MergePlan, append, extended_spec, requantize
from ..methods import get_method

# How often codes are chosen for the change at least and at most, how near to all of it is enough, and how much more of
# it than the time before a time may ask for: with two bits nearly all arrives at once when enough is asked for.
MIN_PASSES = 2
MAX_PASSES = 6
ENOUGH = 0.05
MAX_GROWTH = 2.0
# A change of this part of the weight's norm may lie better on a grid of its own: both are tried.
LARGE_CHANGE = 0.25


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
    statistics = ("second_moment",)

    def __init__(
        self, layers: dict[str, LoraQuantizedLinear], names: list[str], calibration: Calibration, append: bool
    ) -> None:
        self.layers, self.names, self.calibration, self.append = layers, names, calibration, append
        self.needs_targets = calibration.finetune_epochs > 0
        self.seen: dict[str, InputStatistics] = {}  # of this block, for the report after its finetuning

    def visit(self, name: str, statistics: InputStatistics | None) -> None:
        layer = self.layers[name]
        hessian = None if statistics is None else self._hessian(statistics)
        done: list[tuple[MergePlan, QuantizedWeight]] = []

        def rule(plan: MergePlan) -> QuantizedWeight:
            if hessian is None:
                return append(plan) if self.append else requantize(plan)
            spec = extended_spec(plan.weight.spec, name=name) if self.append else plan.weight.spec
            merged = for_outputs(plan, spec, hessian)
            done.append((plan, merged))
            return merged

        layer.merge_with(rule, self.names)
        if statistics is None or hessian is None or not done:
            return
        [(plan, merged)] = done
        self._report(layer, plan, merged, hessian)
        if self.needs_targets and merged is not plan.weight:
            self.seen[name] = statistics

    def finish_block(self, block: str, names: list[str], work: BlockWork) -> bool:
        """Finetune what was merged; the rest, and the norms, unmerging would not put back."""
        changed = [self.layers[name] for name in self.seen]
        if not changed:
            return False
        finetune_block(
            work,
            epochs=self.calibration.finetune_epochs,
            learning_rate=self.calibration.learning_rate,
            layers=[layer.quantized_base() for layer in changed],
            norms=False,
        )
        for layer, statistics in zip(changed, self.seen.values(), strict=True):
            plan = layer.report_again()
            self._report(layer, plan, layer.quantized_base().quantized_weight, self._hessian(statistics))
        self.seen.clear()
        return True

    def _hessian(self, statistics: InputStatistics) -> Tensor:
        return statistics.hessian(damping=self.calibration.damping, shrinkage=self.calibration.shrinkage)

    @staticmethod
    def _report(layer: LoraQuantizedLinear, plan: MergePlan, merged: QuantizedWeight, hessian: Tensor) -> None:
        if layer.merge_report is not None:
            layer.merge_report = with_outputs(layer.merge_report, plan, merged, hessian)


def for_outputs(plan: MergePlan, spec: QuantSpec, hessian: Tensor) -> QuantizedWeight:
    """A weight whose outputs carry the whole change under ``hessian``, from the grid and the codes that are there.

    The weight of least error keeps a part of the change only. What one layer lacks the next ones lack too, and it adds
    up, where noise mostly cancels. Hence more than the change is asked for, until all of it arrives. Of a large change
    the outputs are compared with those of a weight that is quantized from the beginning.
    """
    change = plan.target - plan.before
    if not change.any():
        return plan.weight
    base, found, gain, weighted = plan.base, plan.weight, 1.0, change @ hessian.to(change.device)
    for n_passes in range(1, MAX_PASSES + 1):
        wanted = plan.before + gain * change
        found = base.method.quantize(wanted, spec, name=base.layer_name, hessian=hessian, start=found, rounds=1)
        arrived = coefficient(base.method.dense(found) - plan.before, change, weighted)
        if abs(arrived - 1) < ENOUGH and n_passes >= MIN_PASSES:
            break
        gain *= min(MAX_GROWTH, 1 / max(arrived, 1 / MAX_GROWTH))
    if change.norm() < LARGE_CHANGE * plan.before.norm() or spec != plan.weight.spec:
        return found
    anew = base.method.quantize(plan.target, spec, name=base.layer_name, hessian=hessian)
    return min(found, anew, key=lambda weight: output_error(base.method.dense(weight) - plan.target, hessian))


def output_error(error: Tensor, hessian: Tensor) -> float:
    """Mean squared error of the outputs of a weight with ``error``, for inputs of second moment ``hessian``."""
    return float(((error @ hessian.to(error.device)) * error).sum())


def with_outputs(
    report: LayerMergeReport, plan: MergePlan, merged: QuantizedWeight, hessian: Tensor
) -> LayerMergeReport:
    """``report`` with what ``merged`` did to the outputs of inputs with the second moment ``hessian``."""
    after = plan.base.method.dense(merged)
    kept = change_coefficient(plan.before, plan.target, after, hessian)
    change = plan.target - plan.before
    rest = after - plan.before - kept * change
    energies = [output_error(part, hessian) for part in (change, rest)]
    noise = math.sqrt(max(0.0, energies[1]) / energies[0]) if energies[0] > 0 else 0.0
    return dataclasses.replace(report, output_kept=kept, output_noise=noise)
