"""Quantizing one layer's weight, with the layer's name in errors and warnings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..formats import QuantizedWeight, QuantSpec
from ..methods import get_method
from ..methods.base import InitialCodes

logger = logging.getLogger(__name__)


@contextmanager
def named_errors(layer_name: str, *, remedy: str = "") -> Iterator[None]:
    """Put ``layer_name`` before, and ``remedy`` after, the message of a ValueError or NotImplementedError inside."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        if type(error) not in (ValueError, NotImplementedError) or str(error).startswith(layer_name):
            raise
        raise type(error)(f"{layer_name}: {error}{remedy}") from None


def quantize_weight(
    weight: Tensor,
    spec: QuantSpec,
    *,
    layer_name: str,
    hessian: Tensor | None = None,
    start: QuantizedWeight | None = None,
    initial_codes: InitialCodes = "nearest",
) -> QuantizedWeight:
    """``weight`` (out_features, in_features) of the layer ``layer_name`` quantized; see :meth:`QuantMethod.quantize`.

    ``initial_codes``: one of those of the method.

    Raises:
        ValueError: as the method does, with the layer's name and how to skip it.
    """
    # Methods that know one way only need not take the argument.
    others: dict[str, Any] = {} if initial_codes == "nearest" else {"initial_codes": initial_codes}
    with named_errors(layer_name, remedy=f" Or skip the layer with skip_modules=[{layer_name!r}]."):
        quantized = get_method(spec.method).quantize(weight, spec, hessian=hessian, start=start, **others)
    if quantized.spec != spec and quantized.spec in spec.stored_forms():
        logger.warning(
            "%s: %s cannot hold the scales and other metadata of this layer (very small or very large weights, or a "
            "large common offset), so they are stored in %s.",
            layer_name,
            "8 bits" if getattr(spec, "double_quant", False) else getattr(spec, "scale_dtype", "the spec's dtype"),
            getattr(quantized.spec, "scale_dtype", "a wider one"),
        )
    return quantized
