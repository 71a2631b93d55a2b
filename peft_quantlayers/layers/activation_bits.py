"""Whether layers round their inputs to 8 bits in inference."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import nn

from quantlayers_kernels import native

from ..arguments import check_choice, check_model
from .linear import QuantizedLinear
from .quantized_layers import quantized_modules, quantized_stacks
from .stack import QuantizedStack

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RoundedActivations:
    """What :func:`set_activation_bits` did.

    Fields:
        bits: of the activations, or None for activations as they are.
        layers: names of the layers that have ``bits`` now.
        exact: the layers that stay exact, each with the reason.
    """

    bits: int | None
    layers: tuple[str, ...]
    exact: dict[str, str]


def set_activation_bits(model: nn.Module, bits: int | None) -> RoundedActivations:
    """Let the quantized layers of ``model`` round their inputs to ``bits`` bits in inference, for speed on a CPU.

    A token's inputs are rounded in blocks of 16 columns, each with a scale of its own, and then multiplied in
    integers, as llama.cpp does it with blocks of 32. That costs accuracy, so it is never a default. It holds in
    ``eval`` mode without gradients, uncompiled, on a CPU, for as many tokens at once as are faster so (32 at most);
    all else is computed as before, and it is not saved.

    Args:
        model: a model with quantized layers, with or without adapters.
        bits: 8, or None to compute with activations as they are again.

    Returns:
        The layers that round now, and those that do not, with the reasons; a warning says if there are any of these.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: another number of bits, or no quantized layer in the model can round its inputs. The model was not
            changed.
    """
    check_model("set_activation_bits", model)
    check_choice("bits", bits, (8, None))
    layers: dict[str, QuantizedLinear | QuantizedStack] = {**quantized_modules(model), **quantized_stacks(model)}
    exact = {name: reason for name, layer in layers.items() if (reason := _misfit(layer)) is not None}
    fitting = {name: layer for name, layer in quantized_modules(model).items() if name not in exact}
    if bits is None:
        for layer in quantized_modules(model).values():
            layer.activation_bits = None
        return RoundedActivations(bits=None, layers=tuple(fitting), exact=exact)
    if not fitting:
        found = f"its quantized layers cannot: {_summary(exact)}" if exact else "it has no quantized layers"
        raise ValueError(
            f"no layer of this model can round its inputs to {bits} bits, since {found}. Quantize with HQQ and axis=1 "
            "(quantize_model(model, HQQConfig(nbits=4))). The model was not changed."
        )
    for layer in fitting.values():
        layer.activation_bits = bits
    if exact:
        logger.warning(
            "set_activation_bits: %d of %d quantized layers stay exact: %s.", len(exact), len(layers), _summary(exact)
        )
    return RoundedActivations(bits=bits, layers=tuple(fitting), exact=exact)


def _misfit(layer: QuantizedLinear | QuantizedStack) -> str | None:
    """Why ``layer`` cannot round its inputs, or None."""
    if not isinstance(layer, QuantizedLinear):
        return "stacks of experts have no product with rounded activations"
    if not native.is_available():
        return "the compiled CPU kernels are not in use"
    return layer.method.rounding_misfit(layer.spec)


def _summary(exact: dict[str, str]) -> str:
    """Each reason with the first layer that has it."""
    first = {reason: name for name, reason in reversed(exact.items())}
    return "; ".join(f"{reason} ({name})" for reason, name in first.items())
