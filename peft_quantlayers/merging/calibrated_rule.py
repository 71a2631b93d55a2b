"""The rules of merging that use data: codes are chosen for a low error of the outputs. Pure functions of a plan.

Rounding loses most of an adapter's delta, which is smaller than one step. If the codes of a row are chosen jointly
under the Hessian, the second moment of the layer's inputs, one code compensates for the error of another, and the row
retains more of the delta. A gain on the delta makes up for the fraction that is still lost.
"""

from __future__ import annotations

from torch import Tensor

from ..formats import QuantizedWeight, QuantSpec
from .coefficients import coefficient, output_error
from .merge_rules import extended_spec
from .planned_merge import LayerInputs, MergePlan, MergeResult

# Number of passes over the codes; they end when the retained fraction of the delta is 1 within the tolerance.
MIN_PASSES = 2
MAX_PASSES = 6
RETAINED_TOLERANCE = 0.05
# A pass multiplies the gain on the delta by at most this: with two bits nearly all of the delta is retained at once,
# when the gain is large enough.
MAX_GAIN_RATIO = 2.0
# A delta with this fraction of the weight's norm may need a new grid: both are tried.
LARGE_DELTA = 0.25


def calibrated(plan: MergePlan, spec: QuantSpec, inputs: LayerInputs) -> MergeResult:
    """:func:`for_outputs`, in the form ``spec``."""
    weight = for_outputs(plan, spec, inputs.hessian, inputs.target)
    return MergeResult(strategy="calibrated", weight=weight, hessian=inputs.hessian)


def append_for_outputs(plan: MergePlan, spec: QuantSpec, inputs: LayerInputs) -> MergeResult:
    """:func:`for_outputs`, in the extended form of ``spec``.

    Raises:
        NotImplementedError: it cannot be extended.
    """
    weight = for_outputs(plan, extended_spec(spec), inputs.hessian, inputs.target)
    return MergeResult(strategy="append", weight=weight, hessian=inputs.hessian)


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
