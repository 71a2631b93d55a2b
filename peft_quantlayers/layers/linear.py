"""Linear layers whose weight is quantized. What a weight means is the method's; here is what a layer does.

May import formats, methods and the kernels; never PEFT or transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantlayers_kernels.branch_products import Branch
from quantlayers_kernels.direct_call import is_cpu_inference
from quantlayers_kernels.frozen_linear import FrozenLinear

from ..formats import QuantizedWeight, QuantSpec
from ..integrations.private_transformers import mark_as_initialized
from ..methods import get_method, registered_methods
from ..methods.base import InitialCodes
from ..old_names import OldName
from .call_effects import is_watched
from .dense_types import LINEAR, DenseType
from .direct_product import DirectProduct
from .low_rank_branch import LowRankBranch
from .placement import IN_ONE_PROCESS, check_weights_are_here
from .quantize_weight import quantize_weight
from .quantized_storage import QuantizedStorage
from .shared_product import SharedProduct
from .write_through import WriteThroughWeight, written_values


class QuantizedLinear(QuantizedStorage, nn.Linear):
    """``x @ weight.T + bias`` with a quantized weight; ``isinstance(layer, nn.Linear)`` holds.

    Codes and metadata are frozen Parameters under the names of the method's layout; see :class:`QuantizedStorage`.

    ``weight`` is not stored. Reading it gives the dequantized weight, and writing to it, by assignment or in
    place, quantizes the written values; see :class:`WriteThroughWeight`.

    Attributes:
        spec: how the weight is stored.
        compute_dtype: dtype of ``weight``, and of the product (autocast's dtype has precedence; CPUs without units
            for a half precision compute in float32 inside). The result has the dtype of the input.
        layer_name: the module's name in its model, for messages.
        dense_type: of the module that the architecture has in this place.
        n_writes: how often the weight was written.
        branch: a low-rank branch whose result is added, or None; no part of ``weight``.
        shared_product: the layers that are computed together with this one in inference, or None; see
            :func:`peft_quantlayers.fuse_projections`.
    """

    branch: LowRankBranch | None
    shared_product: SharedProduct | None = None

    as_frozen = OldName("fused_inputs")
    forward_with_update = OldName("forward_with_delta")
    own_parameters = OldName("unshare_parameters")

    def __init__(
        self,
        quantized: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        compute_dtype: torch.dtype,
        layer_name: str = "layer",
        dense_type: DenseType = LINEAR,
    ) -> None:
        nn.Module.__init__(self)
        if type(self) is not layer_type(quantized.spec.method):
            raise TypeError(
                f"{layer_name}: a {quantized.spec.method!r} weight belongs in a "
                f"{layer_type(quantized.spec.method).__name__}, not in a {type(self).__name__}."
            )
        self.spec = quantized.spec
        self.in_features = quantized.in_features
        self.out_features = quantized.out_features
        self.compute_dtype = compute_dtype
        self.layer_name = layer_name
        self.dense_type = dense_type
        self.register_module("branch", None)
        self._register_tensors(quantized, bias)
        mark_as_initialized(self)  # codes always come from a quantizer or a checkpoint

    @staticmethod
    def from_linear(
        linear: nn.Linear, spec: QuantSpec, *, layer_name: str = "layer", hessian: Tensor | None = None
    ) -> QuantizedLinear:
        """Quantize ``linear``, which is left as it is; the bias Parameter is shared.

        ``hessian``: second moment of the inputs, as in :meth:`QuantMethod.quantize`.

        Raises:
            TypeError: ``linear`` is not a linear layer, or ``spec`` not a spec.
            ValueError: the layer is quantized already, its shape does not fit ``spec``, or its weight is not finite.
        """
        if not isinstance(linear, nn.Linear) or not isinstance(spec, QuantSpec):
            raise TypeError(
                f"from_linear takes an nn.Linear and a spec, such as HQQSpec(nbits=4), got {type(linear).__name__} "
                f"and {type(spec).__name__}. For a whole model use quantize_model(model, config)."
            )
        if isinstance(linear, QuantizedLinear):
            raise ValueError(f"{layer_name}: the layer is quantized already ({linear.spec}).")
        layer = QuantizedLinear.from_weight(
            linear.weight, linear.bias, spec, layer_name=layer_name, hessian=hessian, dense_type=LINEAR
        )
        return layer.train(linear.training)

    @staticmethod
    def from_weight(
        weight: Tensor,
        bias: nn.Parameter | None,
        spec: QuantSpec,
        *,
        layer_name: str = "layer",
        hessian: Tensor | None = None,
        initial_codes: InitialCodes = "nearest",
        dense_type: DenseType = LINEAR,
        compute_dtype: torch.dtype | None = None,
    ) -> QuantizedLinear:
        """A layer with ``weight`` (out_features, in_features) quantized; the bias Parameter is shared.

        ``compute_dtype``: None for the dtype of ``weight``. Raises as :meth:`from_linear`.
        """
        quantized = quantize_weight(weight, spec, layer_name=layer_name, hessian=hessian, initial_codes=initial_codes)
        layer = layer_type(spec.method)(
            quantized, compute_dtype=compute_dtype or weight.dtype, layer_name=layer_name, dense_type=dense_type
        )
        layer.register_parameter("bias", bias)
        return layer

    @staticmethod
    def empty(
        spec: QuantSpec,
        *,
        out_features: int,
        in_features: int,
        bias: bool,
        compute_dtype: torch.dtype,
        device: torch.device | str,
        layer_name: str = "layer",
        dense_type: DenseType = LINEAR,
    ) -> QuantizedLinear:
        """A layer of ``spec``'s layout with uninitialised tensors, to load a checkpoint into."""
        quantized = QuantizedWeight.empty(spec, (out_features, in_features), device)
        bias_tensor = torch.empty(out_features, dtype=compute_dtype, device=device) if bias else None
        return layer_type(spec.method)(
            quantized, bias_tensor, compute_dtype=compute_dtype, layer_name=layer_name, dense_type=dense_type
        )

    def add_branch(self, branch: LowRankBranch) -> None:
        """Add the result of ``branch`` to this layer's from now on, in place of an earlier branch."""
        self.branch = branch

    def with_weight(self, quantized: QuantizedWeight, bias: Tensor | None) -> QuantizedLinear:
        """A layer like this one with another weight, which computes as this one does."""
        layer = type(self)(
            quantized,
            bias,
            compute_dtype=self.compute_dtype,
            layer_name=self.layer_name,
            dense_type=self.dense_type,
        )
        layer.activation_bits = self.activation_bits
        return layer.train(self.training)

    def dense_with(self, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
        """The dense module in the architecture's place of this layer, with ``weight`` (out_features, in_features)."""
        return self.dense_type.rebuild(weight, bias, is_training=self.training)

    @property
    def is_conv1d(self) -> bool:
        """Whether the architecture's module keeps its weight transposed, as transformers' ``Conv1D`` does."""
        return self.dense_type.is_transposed

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, (out_features, in_features), in ``dtype`` (default: ``compute_dtype``)."""
        return self.method.dequantize(self._weight_of(self._tensors()), dtype=dtype or self.compute_dtype)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """:meth:`dequantize` with the branch in it: what a plain layer needs to compute the same."""
        if self.branch is None:
            return self.dequantize(dtype)
        return (self.dequantize(torch.float32) + self.branch.dense()).to(dtype or self.compute_dtype)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, metadata and branch included."""
        branch_bits = 0 if self.branch is None else 8 * self.branch.nbytes
        return self.quantized_weight.bits_per_weight + branch_bits / (self.in_features * self.out_features)

    def write_weight(self, weight: Tensor) -> None:
        """Quantize ``weight`` (out_features, in_features) into this layer, with the layer's own spec.

        What is there already is not quantized again: it would come out in other codes.

        Raises:
            ValueError: another shape, NaN or Inf in ``weight``, or this process has no or not all codes of the layer,
                which is left as it was.
        """
        check_weights_are_here(self, f"{self.layer_name}: writing a weight", if_sharded=IN_ONE_PROCESS)
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"{self.layer_name}: cannot write a weight of shape {tuple(weight.shape)} into a layer of shape "
                f"{(self.out_features, self.in_features)}."
            )
        # Inference tensors would forbid every later training step.
        with torch.inference_mode(False), torch.no_grad():
            weight = written_values(weight, self.codes.device)
            if torch.equal(weight, self.dequantize().to(weight.dtype)):
                return
            self.quantized_weight = quantize_weight(weight, self.spec, layer_name=self.layer_name)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        if torch.compiler.is_compiling():
            return self.dequantize()
        return WriteThroughWeight(self)

    def direct_product(self) -> DirectProduct:
        """The product of a few tokens on a CPU, prepared for the weight that the layer has now."""
        direct: DirectProduct | None = self.__dict__.get("_direct_product")
        if direct is None or not direct.is_current(self):
            direct = self.__dict__["_direct_product"] = DirectProduct(self)
        return direct

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``, (..., in_features) to (..., out_features), dtype of ``x``.

        Differentiable in ``x``, in the bias, and in the floating tensors of the weight where they are trained.

        Raises:
            ValueError: ``x`` has another last dimension or is not floating.
        """
        if is_cpu_inference(x):
            direct, shared = self.direct_product(), self.shared_product
            y = None if shared is None else shared(self, direct, x)
            y = direct(self, x) if y is None else y
            if y is not None:
                return y
        return self.forward_with(x, self._weight_of(self._tensors()), self._parameters["bias"])

    def forward_with(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """What :meth:`forward` gives once the layer has this weight and bias."""
        dtype, output_dtype = self._checked_dtypes(x)
        method: Any = get_method(weight.spec.method)
        bits = self.rounded_bits
        rounding = {} if bits is None else {"activation_bits": bits}
        y = method.linear(x.to(dtype), weight, bias, **rounding)
        branch = self._modules["branch"]
        return (y if branch is None else y + branch(x)).to(output_dtype)

    def fused_inputs(self, x: Tensor, branches: Sequence[Branch]) -> FrozenLinear | None:
        """What ``forward`` does to inputs like ``x``, and LoRA's ``branches`` beside it, for one autograd function.

        None if ``forward`` must be called: hooks, a replaced ``forward``, a low-rank branch, or trainable tensors.
        """
        is_replaced = is_watched(self) or type(self).forward is not QuantizedLinear.forward
        tensors = self._tensors()
        if is_replaced or self.branch is not None or any(t.requires_grad for t in tensors.values()):
            return None
        dtype, output_dtype = self._checked_dtypes(x)
        method: Any = self.method
        weight, bias = self._weight_of(tensors), self.bias
        # A product for a gradient takes the inputs as they are.
        bits = None if torch.is_grad_enabled() else self.rounded_bits
        rounding = {} if bits is None else {"activation_bits": bits}
        return FrozenLinear(
            multiply=lambda x: method.linear(x.to(dtype), weight, bias, **rounding).to(output_dtype).contiguous(),
            tiles=lambda dtype: method.weight_tiles(weight, dtype=dtype),
            dtype=dtype,
            bias=bias,
            branches=branches,
        )

    def forward_with_delta(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """What :meth:`forward` will give once ``left @ right`` is merged into the weight's codes.

        The gradient of the two factors passes straight through the rounding; see
        ``quantlayers_kernels.straight_through``.

        Args:
            x: (..., in_features), floating.
            left: (out_features, r), float32.
            right: (r, in_features), float32.
        """
        dtype, output_dtype = self._checked_dtypes(x)
        y = self.method.merged_linear(x.to(dtype), self._weight_of(self._tensors()), left, right, self.bias)
        return (y if self.branch is None else y + self.branch(x)).to(output_dtype)

    def extra_repr(self) -> str:
        shown = [f"{name}={getattr(self.spec, name)}" for name in self.spec.shown_fields]
        features = [f"in_features={self.in_features}", f"out_features={self.out_features}"]
        return ", ".join([*features, f"bias={self.bias is not None}", *shown])

    def reset_parameters(self) -> None:
        """Nothing: codes are never initialised at random."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
        # Before nn.Module registers a Parameter of that name.
        elif not (isinstance(value, WriteThroughWeight) and value.is_held_by(self)):
            self.write_weight(value)


class HQQLinear(QuantizedLinear):
    """A linear layer with an HQQ weight: ``W_q`` (packed codes, uint8), ``scale``, ``zero`` and ``bias``."""


class AQLMLinear(QuantizedLinear):
    """A linear layer with an AQLM weight as published: ``codes``, ``codebooks``, ``scales`` and ``bias``."""


_layer_types: dict[str, type[QuantizedLinear]] = {cls.__name__: cls for cls in (HQQLinear, AQLMLinear)}


def layer_type(method: str) -> type[QuantizedLinear]:
    """The layer class of a registered method, named after its spec; one is made where there is none.

    An ``AbcSpec`` gives an ``AbcLinear``.
    """
    name = _layer_type_name(method)
    if name not in _layer_types:
        doc = f"A linear layer with a weight of method {method!r}; its parameters are those of the spec's layout."
        _layer_types[name] = type(name, (QuantizedLinear,), {"__module__": __name__, "__doc__": doc})
    return _layer_types[name]


def _layer_type_name(method: str) -> str:
    return get_method(method).spec_type.__name__.removesuffix("Spec") + "Linear"


def __getattr__(name: str) -> Any:
    """Layer classes that :func:`layer_type` makes, by name: pickle looks for them here, also in a new process."""
    if not name.startswith("__"):  # ``__path__``, which every import asks for: too early to load other packages
        for method in registered_methods():
            if name == _layer_type_name(method):
                return layer_type(method)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
