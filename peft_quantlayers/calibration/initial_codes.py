"""Which codes the quantizer of a layer begins with: chosen by the error on tokens that it was not fitted to."""

from __future__ import annotations

from torch import Tensor

from ..formats import QuantSpec
from ..layers.quantize_weight import quantize_weight
from ..methods import get_method
from ..methods.any_threads import sum_of_all
from ..methods.base import InitialCodes
from .calibration_data import Calibration
from .statistics import InputStatistics

# Rows of a weight that are quantized for the choice; each row is quantized for itself.
ROWS = 64


def chosen_initial_codes(
    weight: Tensor, spec: QuantSpec, statistics: InputStatistics | None, calibration: Calibration, *, layer_name: str
) -> InitialCodes:
    """What ``calibration`` says, or with "best" the way of lowest error on the other half of the tokens, both ways.

    Args:
        weight: what is to be quantized, (out_features, in_features), any floating dtype.
        spec: how.
        layer_name: for messages.
        statistics: of the layer's inputs, with "second_moment" and "first_half"; None where the data never reached it.
    """
    method = get_method(spec.method)
    if calibration.initial_codes != "best":
        return calibration.initial_codes
    halves = None if statistics is None else statistics.halves(("second_moment",))
    if halves is None or len(method.initial_codes) == 1:
        return "nearest"
    rows = weight.detach()[:: max(1, len(weight) // ROWS)].float()
    errors = dict.fromkeys(method.initial_codes, 0.0)
    for fitted, held_out in (halves, halves[::-1]):
        hessian = fitted.hessian(damping=calibration.damping, shrinkage=calibration.used_shrinkage)
        assert held_out.second_moment is not None
        moment = held_out.second_moment.to(rows.device)
        for name in errors:
            quantized = quantize_weight(rows, spec, layer_name=layer_name, hessian=hessian, initial_codes=name)
            lost = method.dequantize(quantized) - rows
            errors[name] += float(sum_of_all((lost @ moment) * lost))
    return min(errors, key=errors.__getitem__)
