"""The fast path of a quantized layer: for a few tokens on a CPU, without gradients.

One token through a small layer takes the kernel some 20 microseconds, and it takes as long to ask which kernel and
with which arguments. Those questions are answered here once for a weight.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from quantlayers_kernels import native

from .codes_parameter import CodesParameter
from .quantized_storage import QuantizedStorage

# Other classes, such as the shards of FSDP2, need not lie in memory as their shape says.
PLAIN = (nn.Parameter, CodesParameter)


class DirectProduct:
    """A layer's product, prepared for the weight that the layer has now.

    The layer asks before each call whether its weight is still that one: tensors are replaced and moved without notice
    (``parameter.data = ...``). A copy or a pickle is None; the copied layer makes its own.
    """

    __slots__ = ("_bits", "_n_writes", "_places", "_product", "_spec")

    def __init__(self, layer: QuantizedStorage) -> None:
        self._spec, self._n_writes, self._bits = layer.spec, layer.n_writes, layer.rounded_bits
        tensors = {name: layer._parameters[name] for name in layer._tensor_names}
        is_plain = all(type(tensor) in PLAIN for tensor in tensors.values())
        # Not the tensors themselves, which would stay in memory when the layer moves.
        self._places = tuple((name, id(tensor), _address_of(tensor)) for name, tensor in tensors.items())
        can_prepare = is_plain and layer.compute_dtype in native.KINDS
        method: Any = layer.method
        rounding = {} if self._bits is None else {"activation_bits": self._bits}
        weight = layer._weight_of(layer._tensors()) if can_prepare else None
        self._product = method.prepared_product(weight, **rounding) if can_prepare else None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def is_current(self, layer: QuantizedStorage) -> bool:
        """Whether the layer still has the weight, and rounds its inputs to the bits, that this was made for."""
        if layer.n_writes != self._n_writes or layer.spec is not self._spec or layer.rounded_bits != self._bits:
            return False
        parameters = layer._parameters
        for name, identity, address in self._places:
            tensor = parameters[name]
            if id(tensor) != identity or _address_of(tensor) != address:
                return False
        return True

    def __call__(self, layer: QuantizedStorage, x: Tensor) -> Tensor | None:
        """The layer's result for ``x``, a plain tensor on the CPU; None where it does not apply."""
        parameters = layer._parameters
        bias = parameters["bias"]
        if (
            self._product is None
            or x.dtype is not layer.compute_dtype
            or layer._modules["branch"] is not None
            or (bias is not None and not (type(bias) is nn.Parameter and bias.is_cpu))
        ):
            return None
        return self._product(x, parameters, bias)


def _address_of(tensor: Any) -> int:
    return tensor.data_ptr() if type(tensor) in PLAIN else 0
