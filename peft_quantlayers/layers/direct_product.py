"""The fast path of a quantized layer: for a few tokens on a CPU, without gradients.

One token through a small layer takes the kernel some 20 microseconds, and it takes as long to ask which kernel and
with which arguments. Those questions are answered here once for a weight.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from quantlayers_kernels import native
from quantlayers_kernels.prepared import PreparedProduct

from .codes_parameter import CodesParameter
from .quantized_storage import QuantizedStorage

# Other classes, such as the shards of FSDP2, need not lie in memory as their shape says.
PLAIN = frozenset({nn.Parameter, CodesParameter})


class DirectProduct:
    """A layer's product, prepared for the weight that the layer has now.

    The layer asks before each call whether its weight is still that one: tensors are replaced and moved without notice
    (``parameter.data = ...``). A copy or a pickle is None; the copied layer makes its own.
    """

    __slots__ = ("_bits", "_counts_writes", "_n_writes", "_product", "_spec", "places")

    def __init__(self, layer: QuantizedStorage) -> None:
        self._spec, self._n_writes, self._bits = layer.spec, layer.n_writes, layer.rounded_bits
        tensors = {name: layer._parameters[name] for name in layer._tensor_names}
        is_plain = PLAIN.issuperset(map(type, tensors.values()))
        # Not the tensors themselves, which would stay in memory when the layer moves.
        self.places = tuple(
            (name, id(tensor), tensor.data_ptr() if is_plain else 0)  # type: ignore[union-attr]
            for name, tensor in tensors.items()
        )
        self._counts_writes = is_plain and not any(map(Tensor.is_inference, tensors.values()))  # type: ignore[arg-type]
        can_prepare = is_plain and layer.compute_dtype in native.KINDS
        method: Any = layer.method
        rounding = {} if self._bits is None else {"activation_bits": self._bits}
        weight = layer._weight_of(layer._tensors()) if can_prepare else None
        self._product = method.prepared_product(weight, **rounding) if can_prepare else None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def is_current(self, layer: QuantizedStorage) -> bool:
        """Whether the layer still has the weight, and rounds its inputs to the bits, that this was made for."""
        bits = None if layer.training else layer.activation_bits  # rounded_bits, without a call
        if layer.n_writes != self._n_writes or layer.spec is not self._spec or bits != self._bits:
            return False
        parameters = layer._parameters
        for name, identity, address in self.places:
            tensor: Any = parameters[name]
            # The address after the identity: only tensors of a plain class have one.
            if id(tensor) != identity or (address and tensor.data_ptr() != address):
                return False
        return True

    def __call__(self, layer: QuantizedStorage, x: Tensor) -> Tensor | None:
        """The layer's result for ``x``, a plain tensor on the CPU; None where it does not apply."""
        product = self.product_for(layer) if x.dtype is layer.compute_dtype else None
        parameters = layer._parameters
        return None if product is None else product(x, parameters, parameters["bias"])

    def product_for(self, layer: QuantizedStorage) -> PreparedProduct | None:
        """The product whose result for inputs of ``compute_dtype`` is the layer's; None where it is not."""
        bias = layer._parameters["bias"]
        if layer._modules["branch"] is not None or (
            bias is not None and not (type(bias) is nn.Parameter and bias.is_cpu)
        ):
            return None
        return self._product

    def state(self, layer: QuantizedStorage) -> tuple[Any, ...] | None:
        """What the layer's results depend on, besides the input; None if torch does not count all writes to it."""
        parameters = layer._parameters
        bias: Any = parameters["bias"]
        version = 0
        if bias is not None:
            if bias.is_inference():
                return None
            version = bias._version
        if not self._counts_writes:
            return None
        for name, _, _ in self.places:
            version += parameters[name]._version  # type: ignore[union-attr]
        return self, version, id(bias), layer._modules["branch"], layer.compute_dtype
