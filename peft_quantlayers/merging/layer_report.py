"""What a merge did to one layer, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from ..old_names import OldName
from .coefficients import output_error, retained_fraction
from .planned_merge import MergePlan, MergeResult


@dataclass(frozen=True, kw_only=True)
class LayerMergeReport:
    """What one merge did to one layer.

    Fields:
        name: module name of the base layer.
        adapters: adapters whose delta is in the merged weight.
        method: the layer's quantization method.
        strategy: the strategy that merged it; for "auto" the one that was chosen.
        n_weights: of the layer.
        bits_before, bits_after: stored bits per weight.
        weight_norm, delta_norm, error_norm: Frobenius norms of the float target ``W + delta``, of the delta, and of
            the difference between the merged weight and the target.
        delta_retained: the fraction of the delta that is in the merged weight: 1 for all of it, 0 for none. The
            coefficient of the delta in ``merged - W``, by least squares; noise counts in ``error_norm`` only.
        output_retained: the same for the outputs, on the tokens of ``evaluate_on``, else on the calibration inputs;
            None without either.
        output_noise: norm of all other differences of the outputs, over that of the delta in them; None in the same
            cases.
        strategies: besides "requantize" and "dense", those that these adapters on this weight can be merged with;
            "aware" if such adapters can be trained for it.
        is_merge_aware: the adapters were trained through the rounding of this weight, for "aware".
        can_be_qalora: QA-LoRA adapters, which merge exactly, can be trained on this weight.
    """

    name: str
    adapters: tuple[str, ...]
    method: str
    strategy: str
    n_weights: int
    bits_before: float
    bits_after: float
    weight_norm: float
    delta_norm: float
    error_norm: float
    delta_retained: float
    output_retained: float | None = None
    output_noise: float | None = None
    strategies: tuple[str, ...] = ()
    is_merge_aware: bool = False
    can_be_qalora: bool = False

    change_norm = OldName("delta_norm")
    change_kept = OldName("delta_retained")
    output_kept = OldName("output_retained")
    is_aware = OldName("is_merge_aware")

    @property
    def relative_error(self) -> float:
        """``error_norm / weight_norm``."""
        return self.error_norm / self.weight_norm if self.weight_norm else 0.0


def layer_report(plan: MergePlan, result: MergeResult) -> LayerMergeReport:
    """The report on the merge ``plan`` with its ``result``; of the outputs too if this has a ``hessian``."""
    merged = result.merged(plan)
    report = LayerMergeReport(
        name=plan.layer_name,
        adapters=plan.adapters.names,
        method=plan.weight.spec.method,
        strategy=result.strategy,
        n_weights=plan.target.numel(),
        bits_before=plan.weight.bits_per_weight,
        bits_after=result.bits_per_weight,
        weight_norm=float(plan.target.norm()),
        delta_norm=float((plan.target - plan.before).norm()),
        error_norm=float((merged - plan.target).norm()),
        delta_retained=retained_fraction(plan.before, plan.target, merged),
        strategies=plan.adapters.strategies,
        is_merge_aware=plan.adapters.is_merge_aware,
        can_be_qalora=plan.adapters.can_be_qalora,
    )
    return report if result.hessian is None else _with_outputs(report, plan, merged, result.hessian)


def _with_outputs(report: LayerMergeReport, plan: MergePlan, merged: Tensor, hessian: Tensor) -> LayerMergeReport:
    retained = retained_fraction(plan.before, plan.target, merged, hessian)
    delta = plan.target - plan.before
    rest = merged - plan.before - retained * delta
    energies = [output_error(part, hessian) for part in (delta, rest)]
    noise = math.sqrt(max(0.0, energies[1]) / energies[0]) if energies[0] > 0 else 0.0
    return replace(report, output_retained=retained, output_noise=noise)
