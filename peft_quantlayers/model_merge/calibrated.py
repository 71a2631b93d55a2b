"""Merge adapters so that the outputs come out right on calibration data, block by block.

Rounding a weight with an adapter's delta loses most of the delta, which is smaller than a step. Chosen together
under the second moment of the layer's inputs, the codes of a row carry it: what one cannot express, others take over.
What is still missing is asked for again.
"""

from __future__ import annotations

from peft import PeftModel
from torch import Tensor

from ..calibration import BlockWork, Calibration, InputGroup, Visitor, walk
from ..calibration.finetune import finetune_block
from ..formats import QuantizedWeight, QuantSpec
from ..layers.quantize_weight import named_errors
from ..lora import LoraQuantizedLinear
from ..merging import MergePlan, MergeResult
from ..merging.coefficients import coefficient, output_error
from ..merging.layer_report import with_outputs
from ..merging.rules import append, extended_spec, requantize
from ..methods import get_method

# How often codes are chosen for the delta at least and at most, how near to all of it is enough, and how much more of
# it than the time before a pass may ask for: with two bits nearly all arrives at once when enough is asked for.
MIN_PASSES = 2
MAX_PASSES = 6
ENOUGH = 0.05
MAX_GROWTH = 2.0
# A delta of this fraction of the weight's norm may fit a grid of its own better: both are tried.
LARGE_DELTA = 0.25


def merge_calibrated(
    peft_model: PeftModel, names: list[str], calibration: Calibration, *, strategy: str, progress: bool = True
) -> None:
    """Merge ``names`` into the quantized layers of ``peft_model`` that have one; they must be its active adapters.

    Args:
        strategy: "calibrated", or "append" to extend the format of the weights for the delta.

    Raises:
        ValueError, TypeError: the data is refused, as by :meth:`Calibration.batches`, or a layer's spec cannot use it.
        NotImplementedError: "append", and a format cannot be extended.
    """
    layers = {
        name: module
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraQuantizedLinear) and any(each in module.lora_A for each in names)
    }
    for name, layer in layers.items():
        spec = layer.quantized_base().spec
        method = get_method(spec.method)
        if not method.can_use_hessian(spec):
            raise ValueError(
                f'{name}: strategy="calibrated" is not possible for {spec}. {method.calibration_requirement} Or merge '
                'with "requantize", or "keep" for plain LoRA. The model is left as it was.'
            )
        if strategy == "append":
            with named_errors(name):
                extended_spec(spec)
    walk(peft_model, list(layers), calibration, _MergeVisitor(layers, names, calibration, strategy), progress=progress)


class _MergeVisitor(Visitor):
    statistics = ("second_moment",)

    def __init__(
        self, layers: dict[str, LoraQuantizedLinear], names: list[str], calibration: Calibration, strategy: str
    ) -> None:
        self.layers, self.names, self.calibration, self.strategy = layers, names, calibration, strategy
        self.needs_targets = calibration.finetune_epochs > 0
        self.hessians: dict[str, Tensor] = {}  # of this block, for the report after its finetuning

    def visit_group(self, group: InputGroup) -> None:
        hessian = group.hessian(self.calibration)
        for name in group.names:
            self._merge(name, hessian)

    def _merge(self, name: str, hessian: Tensor | None) -> None:
        layer = self.layers[name]
        if hessian is None:
            return layer.merge_by(append if self.strategy == "append" else requantize, self.names)
        with named_errors(name):
            plan = layer.plan(self.names)
            spec = extended_spec(plan.weight.spec) if self.strategy == "append" else plan.weight.spec
            merged = for_outputs(plan, spec, hessian)
        layer.apply_merge(plan, MergeResult(strategy=self.strategy, weight=merged))
        _report_outputs(layer, plan, merged, hessian)
        if self.needs_targets and merged is not plan.weight:
            self.hessians[name] = hessian

    def finish_block(self, block: str, names: list[str], work: BlockWork) -> bool:
        """Finetune what was merged; not the rest, and not the norms, which unmerging would not put back."""
        changed = [self.layers[name] for name in self.hessians]
        if not changed:
            return False
        finetune_block(
            work,
            epochs=self.calibration.finetune_epochs,
            learning_rate=self.calibration.learning_rate,
            layers=[layer.quantized_base() for layer in changed],
            norms=False,
        )
        for layer, hessian in zip(changed, self.hessians.values(), strict=True):
            plan = layer.refresh_report()
            _report_outputs(layer, plan, layer.quantized_base().quantized_weight, hessian)
        self.hessians.clear()
        return True


def _report_outputs(layer: LoraQuantizedLinear, plan: MergePlan, merged: QuantizedWeight, hessian: Tensor) -> None:
    if layer.merging.report is not None:
        layer.merging.report = with_outputs(layer.merging.report, plan, merged, hessian)


def for_outputs(plan: MergePlan, spec: QuantSpec, hessian: Tensor) -> QuantizedWeight:
    """A weight whose outputs carry the whole delta under ``hessian``, from the grid and the codes that are there.

    The weight of lowest error retains a fraction of the delta only. What one layer lacks the next ones lack too, and
    it adds up, where noise mostly cancels. Hence more than the delta is asked for, until all of it arrives. For a
    large delta the outputs are compared with those of a weight that is quantized from scratch.
    """
    delta, method = plan.delta, plan.method
    if not delta.any():
        return plan.weight
    found, gain, weighted = plan.weight, 1.0, delta @ hessian.to(delta.device)
    for n_passes in range(1, MAX_PASSES + 1):
        wanted = plan.before + gain * delta
        found = method.quantize(wanted, spec, hessian=hessian, start=found, iterations=1)
        arrived = coefficient(method.dequantize(found) - plan.before, delta, weighted)
        if abs(arrived - 1) < ENOUGH and n_passes >= MIN_PASSES:
            break
        gain *= min(MAX_GROWTH, 1 / max(arrived, 1 / MAX_GROWTH))
    if delta.norm() < LARGE_DELTA * plan.before.norm() or spec != plan.weight.spec:
        return found
    from_scratch = method.quantize(plan.target, spec, hessian=hessian)
    return min(found, from_scratch, key=lambda weight: output_error(method.dequantize(weight) - plan.target, hessian))
