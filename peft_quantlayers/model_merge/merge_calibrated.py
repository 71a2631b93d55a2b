"""Merge adapters with a low output error on calibration data, block by block.

Rounding loses most of an adapter's delta, which is smaller than one step. If the codes of a row are chosen jointly
under the Hessian, the second moment of the layer's inputs, one code compensates for the error of another, and the row
retains more of the delta. A gain on the delta makes up for the fraction that is still lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from peft import PeftModel
from torch import Tensor, nn

from ..calibration import BlockWork, Calibration, InputGroup, InputStatistics, Visitor, walk
from ..calibration.asymmetric_targets import asymmetric_target
from ..calibration.finetune import finetune_block
from ..calibration.quantize_calibrated import wanted_statistics
from ..formats import QuantizedWeight, QuantSpec
from ..layers.quantize_weight import named_errors
from ..merging import MergePlan, MergeResult, MergeSource
from ..merging.coefficients import coefficient, output_error
from ..merging.layer_report import LayerMergeReport, layer_report, with_outputs
from ..merging.merge_rules import append, extended_spec, requantize, requantize_as
from ..merging.planned_merge import MergeRule
from ..merging.stack_source import StackSource
from ..methods import get_method
from .targets import MergeTarget

# Number of passes over the codes; they end when the retained fraction of the delta is 1 within the tolerance.
MIN_PASSES = 2
MAX_PASSES = 6
RETAINED_TOLERANCE = 0.05
# A pass multiplies the gain on the delta by at most this: with two bits nearly all of the delta is retained at once,
# when the gain is large enough.
MAX_GAIN_RATIO = 2.0
# A delta with this fraction of the weight's norm may need a new grid: both are tried.
LARGE_DELTA = 0.25


def merge_calibrated(
    peft_model: PeftModel,
    targets: Sequence[MergeTarget],
    names: list[str],
    calibration: Calibration,
    *,
    strategy: str,
    specs: Mapping[str, QuantSpec] | None = None,
    progress: bool = True,
) -> None:
    """Merge ``names`` into the layers ``targets`` of ``peft_model``; they must be its active adapters.

    Args:
        targets: layers whose source ``can_be_calibrated``.
        strategy: "calibrated", or "append" to extend the format of the weights for the delta.
        specs: for "calibrated", by the layer's name in the base model, what its merged weight is stored as; None, and
            for layers that are not in it, as its weight is stored now.

    Raises:
        ValueError, TypeError: the data is refused, as by :meth:`Calibration.batches`, or a layer's spec cannot use it.
        NotImplementedError: "append", and a format cannot be extended.
    """
    model, specs = peft_model.get_base_model(), specs or {}
    # A linear layer's adapter is the module that is called; a stack is called itself, inside its experts module.
    sources = {id(called_module(target.source)): target.source for target in targets}
    layers = {name: sources[id(module)] for name, module in model.named_modules() if id(module) in sources}
    for name, layer in layers.items():
        spec = specs.get(name, layer.quantized_base().spec)
        method = get_method(spec.method)
        if strategy == "append":
            with named_errors(name):
                extended_spec(spec)
        if not method.can_use_hessian(spec):
            raise ValueError(
                f"{name}: strategy={strategy!r} with calibration data is not possible for {spec}. "
                f'{method.calibration_requirement} Or merge with "requantize", or "keep" for plain LoRA. The model is '
                "left as it was."
            )
    walk(
        model, list(layers), calibration, _MergeVisitor(layers, names, calibration, strategy, specs), progress=progress
    )


class _MergeVisitor(Visitor):
    def __init__(
        self,
        layers: dict[str, MergeSource],
        names: list[str],
        calibration: Calibration,
        strategy: str,
        specs: Mapping[str, QuantSpec],
    ) -> None:
        self.layers, self.names, self.calibration, self.strategy = layers, names, calibration, strategy
        self.specs = specs
        self.needs_targets = calibration.finetune_epochs > 0
        self.statistics = wanted_statistics(calibration)
        self.hessians: dict[str, Tensor] = {}  # of this block, for the report after its finetuning

    def visit_group(self, group: InputGroup) -> None:
        if group.experts is not None:
            return self._merge_stack(group)
        hessian = group.hessian(self.calibration)
        for name in group.names:
            self._merge(name, hessian, group.statistics)
        return None

    def _merge_stack(self, group: InputGroup) -> None:
        """Each expert with the second moment that it has."""
        (name,) = group.names
        source = cast(StackSource, self.layers[name])

        def merged(expert: int, plan: MergePlan) -> tuple[MergeResult, LayerMergeReport]:
            hessian = group.hessian_of_expert(expert, self.calibration)
            if hessian is None:
                result = append(plan) if self.strategy == "append" else requantize(plan)
                return result, layer_report(plan, result)
            spec = extended_spec(plan.weight.spec) if self.strategy == "append" else plan.weight.spec
            weight = for_outputs(plan, spec, hessian)
            result = MergeResult(strategy=self.strategy, weight=weight)
            return result, with_outputs(layer_report(plan, result), plan, weight, hessian)

        source.merge_experts(merged, self.names)

    def _merge(self, name: str, hessian: Tensor | None, statistics: InputStatistics | None) -> None:
        layer = self.layers[name]
        if hessian is None:
            rule = append if self.strategy == "append" else rule_of(self.specs.get(name))
            return layer.merge_by(rule, self.names)
        with named_errors(name):
            plan = layer.plan(self.names)
            own = self.specs.get(name, plan.weight.spec)
            spec = extended_spec(own) if self.strategy == "append" else own
            merged = for_outputs(plan, spec, hessian, asymmetric_target(plan.target, statistics))
        layer.apply_merge(plan, MergeResult(strategy=self.strategy, weight=merged))
        _report_outputs(layer, plan, merged, hessian)
        if self.needs_targets and merged is not plan.weight:
            self.hessians[name] = hessian

    def finish_block(self, block: str, names: list[str], work: BlockWork) -> bool:
        """Finetune the merged layers only: unmerging would not restore norms or other layers."""
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


def called_module(source: MergeSource) -> nn.Module:
    """The module whose forward pass reads the inputs of the layer under the adapters."""
    return source.current_base() if isinstance(source, StackSource) else cast(nn.Module, source)


def _report_outputs(layer: MergeSource, plan: MergePlan, merged: QuantizedWeight, hessian: Tensor) -> None:
    if layer.merging.report is not None:
        layer.merging.report = with_outputs(layer.merging.report, plan, merged, hessian)


def rule_of(spec: QuantSpec | None) -> MergeRule:
    """The rule that merges without data into weights stored as ``spec``; None for as they are stored now."""
    return requantize if spec is None else lambda plan: requantize_as(plan, spec)


def for_outputs(
    plan: MergePlan, spec: QuantSpec, hessian: Tensor, asymmetric: Tensor | None = None
) -> QuantizedWeight:
    """A weight whose outputs retain the whole delta under ``hessian``, starting from the current grid and codes.

    A ``spec`` that cannot take these, of another number of bits, is quantized from scratch first.

    The weight of lowest error retains only a fraction of the delta. These losses add up over layers, while noise
    mostly cancels. So the delta is multiplied by a gain, which is raised until the outputs retain all of the delta.
    For a large delta the output error is compared with that of quantizing from scratch.

    ``asymmetric``: the target that makes up for the errors of the layers before this one, in place of the plan's.
    """
    delta, method, own = plan.delta, plan.method, plan.weight.spec
    whole = plan.target if asymmetric is None else asymmetric
    found = plan.weight if can_start_from(own, spec) else method.quantize(whole, spec, hessian=hessian)
    if not delta.any():
        return found
    start = plan.before if asymmetric is None else plan.before + (asymmetric - plan.target)
    gain, weighted = 1.0, delta @ hessian.to(delta.device)
    for n_passes in range(1, MAX_PASSES + 1):
        target = start + gain * delta
        found = method.quantize(target, spec, hessian=hessian, start=found, iterations=1)
        retained = coefficient(method.dequantize(found) - start, delta, weighted)
        if abs(retained - 1) < RETAINED_TOLERANCE and n_passes >= MIN_PASSES:
            break
        gain *= min(MAX_GAIN_RATIO, 1 / max(retained, 1 / MAX_GAIN_RATIO))
    if delta.norm() < LARGE_DELTA * plan.before.norm() or spec != own:
        return found
    from_scratch = method.quantize(whole, spec, hessian=hessian)
    return min(found, from_scratch, key=lambda weight: output_error(method.dequantize(weight) - whole, hessian))


def can_start_from(own: QuantSpec, spec: QuantSpec) -> bool:
    """Whether a weight stored as ``own`` is one that quantizing to ``spec`` may start from."""
    try:
        return spec in (own, own.extended())
    except NotImplementedError:  # a format that cannot be extended
        return spec == own
