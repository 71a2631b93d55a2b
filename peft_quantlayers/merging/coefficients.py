"""How much of a delta is in a merged weight: least squares on weights or on outputs. Pure arithmetic in float32."""

from torch import Tensor


def retained_fraction(before: Tensor, target: Tensor, merged: Tensor, hessian: Tensor | None = None) -> float:
    """The coefficient of ``target - before`` in ``merged - before``, by least squares; 1 without a delta.

    With ``hessian`` (in_features, in_features), the second moment of the inputs, the same for the outputs.
    """
    delta = target - before
    return coefficient(merged - before, delta, delta if hessian is None else delta @ hessian.to(delta.device))


def coefficient(moved: Tensor, delta: Tensor, weighted: Tensor) -> float:
    """The coefficient of ``delta`` in ``moved``, with ``weighted`` the delta times its weights; 1 without a delta."""
    energy = (weighted * delta).sum()
    return float((moved * weighted).sum() / energy) if energy > 0 else 1.0


def output_error(error: Tensor, hessian: Tensor) -> float:
    """``tr(E H E.T)``: squared error of the outputs of a weight with ``error``, for inputs of second moment ``H``."""
    return float(((error @ hessian.to(error.device)) * error).sum())
