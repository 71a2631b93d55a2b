"""The tensors of a quantized weight as Parameters of a module: registered, moved, copied and loaded as torch does it.

Here is what torch must not do to them: change their dtypes, or count packed bytes as weights. What the weight means,
and how it computes, is in ``linear.py`` for one weight and in ``stack.py`` for a stack of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ..formats import QuantizedWeight, QuantSpec
from ..formats.checkpoint import SENTINEL_SHAPE
from ..methods import QuantMethod, get_method
from .codes_parameter import SENDABLE, CodesParameter, as_bytes, as_codes


class QuantizedStorage(nn.Module):
    """Codes and metadata as frozen Parameters under the names of the spec's layout, and a bias.

    They follow the module between devices and keep their dtypes: ``.to(dtype)`` changes ``compute_dtype`` and the bias
    alone. Codes of more than a byte are registered as bytes, which DDP and FSDP can send (:func:`as_bytes`);
    ``quantized_weight`` has them in the dtype of the layout.

    Attributes:
        spec: how the weight is stored.
        compute_dtype: dtype of the dense weight.
        layer_name: the module's name in its model, for messages.
        n_writes: how often the weight was written.
        leading: dimensions of a stack of weights; () for a single one.
        sharing: the layers that hold the same tensors, this one included: a write to one is a write to all.
        activation_bits: bits that inputs are rounded to in inference, or None; see :func:`set_activation_bits`.
    """

    spec: QuantSpec
    leading: tuple[int, ...] = ()
    in_features: int
    out_features: int
    compute_dtype: torch.dtype
    layer_name: str
    n_writes: int = 0
    sharing: Sequence[QuantizedStorage] = ()
    activation_bits: int | None = None

    def _register_tensors(self, quantized: QuantizedWeight, bias: Tensor | None) -> None:
        """Called once, by the constructor."""
        self._tensor_names = tuple(quantized.tensors)
        self._codes_dtype = quantized.tensors[quantized.spec.codes_name].dtype
        for name, tensor in self._registered(quantized).items():
            # Not register_parameter, which refuses a method's tensor named ``codes`` because of the property.
            self._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        self.register_parameter("bias", bias if bias is None else nn.Parameter(bias.detach(), bias.requires_grad))
        self._wrap_codes()
        self._is_built = True

    @property
    def method(self) -> QuantMethod:
        """The quantization method of this layer."""
        return get_method(self.spec.method)

    @property
    def rounded_bits(self) -> int | None:
        """``activation_bits`` in evaluation mode; in training, where some passes want no gradients either, None."""
        return None if self.training else self.activation_bits

    @property
    def codes(self) -> Tensor:
        """The packed codes as they are registered; their device is the layer's."""
        return self._parameter(self.spec.codes_name)

    @property
    def codes_dtype(self) -> torch.dtype:
        """The dtype of the codes in the layout and in files."""
        return self._codes_dtype

    @property
    def has_wide_codes(self) -> bool:
        """Whether the codes are registered as bytes, since process groups do not send their dtype."""
        return self._codes_dtype not in SENDABLE

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The weight as a value. Its tensors are the layer's own, not copies; a write to the layer replaces them."""
        return self._weight_of({name: tensor.data for name, tensor in self._tensors().items()})

    @quantized_weight.setter
    def quantized_weight(self, quantized: QuantizedWeight) -> None:
        shape = (*self.leading, self.out_features, self.in_features)
        if quantized.shape != shape:
            raise ValueError(
                f"{self.layer_name}: a weight of shape {quantized.shape} does not fit a layer of shape {shape}."
            )
        self.n_writes += 1
        self.spec = quantized.spec
        self._codes_dtype = quantized.tensors[quantized.spec.codes_name].dtype
        self._name_tensors(tuple(quantized.tensors))
        for name, tensor in self._registered(quantized).items():
            old = self._parameters.get(name)
            if old is not None and old.dtype == tensor.dtype and old.device == tensor.device:
                old.data = tensor  # the Parameter object stays: an optimizer may hold it
            else:
                trains = old is not None and old.requires_grad and tensor.is_floating_point()
                self._parameters[name] = nn.Parameter(tensor, requires_grad=trains)
        self._wrap_codes()
        for other in self.sharing:
            if other is not self:
                other._take_tensors_of(self)

    def resize(self, quantized: QuantizedWeight) -> None:
        """Hold ``quantized``, which may have another number of rows, and so do the layers that share the tensors.

        The bias and the low-rank branch get zeros for rows that are added.
        """
        self._set_rows(quantized.out_features)
        self.quantized_weight = quantized

    def _set_rows(self, n_rows: int) -> None:
        self.out_features = n_rows
        branch = self._modules.get("branch")
        for parameter in (self._parameters["bias"], None if branch is None else branch._parameters["B"]):
            if parameter is not None and len(parameter) != n_rows:
                kept = parameter.data[:n_rows]
                parameter.data = torch.cat([kept, kept.new_zeros(n_rows - len(kept), *kept.shape[1:])])

    def share_tensors(self, others: Sequence[QuantizedStorage]) -> None:
        """Have ``others``, layers of the same spec and shape, hold this layer's tensors in the place of their own.

        There is one copy then, and a write to one of the layers is a write to all of them, as with a tied dense
        weight.
        """
        group = (self, *others)
        for layer in group:
            layer.sharing = group
        for other in others:
            other._take_tensors_of(self)

    def _take_tensors_of(self, other: QuantizedStorage) -> None:
        self.spec, self._codes_dtype = other.spec, other._codes_dtype
        self._set_rows(other.out_features)
        self.n_writes += 1
        self._name_tensors(other._tensor_names)
        for name in self._tensor_names:
            self._parameters[name] = other._parameters[name]

    def _name_tensors(self, names: tuple[str, ...]) -> None:
        """Drop the tensors that a weight of another layout no longer has."""
        for name in set(self._tensor_names) - set(names):
            del self._parameters[name]
        self._tensor_names = names

    def unshare_parameters(self) -> None:
        """Take new Parameters around the same tensors, so that a write reaches no other layer that shares the old."""
        others = tuple(each for each in self.sharing if each is not self)
        for layer in others:
            layer.sharing = others if len(others) > 1 else ()
        self.sharing = ()
        for name, parameter in list(self._parameters.items()):
            if parameter is not None:
                self._parameters[name] = nn.Parameter(parameter.data, parameter.requires_grad)
        self._wrap_codes()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # torch gives each module a dictionary of its own
        sentinel = state_dict.get(key := f"{prefix}weight")
        if sentinel is not None and tuple(sentinel.shape) == SENTINEL_SHAPE:
            del state_dict[key]
        codes = state_dict.get(key := prefix + self.spec.codes_name)
        if codes is not None and codes.dtype == self._codes_dtype:  # from a file, or written by an older version
            state_dict[key] = as_bytes(codes)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.n_writes += 1

    def _parameter(self, name: str) -> nn.Parameter:
        return cast(nn.Parameter, self._parameters[name])

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of the layout."""
        parameters = self._parameters
        tensors: dict[str, Any] = {name: parameters[name] for name in self._tensor_names}
        codes_name = self.spec.codes_name
        if tensors[codes_name].dtype != self._codes_dtype:
            tensors[codes_name] = as_codes(tensors[codes_name], self._codes_dtype)
        return tensors

    @staticmethod
    def _registered(quantized: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors of ``quantized`` as they are registered."""
        codes_name = quantized.spec.codes_name
        return quantized.tensors | {codes_name: as_bytes(quantized.tensors[codes_name])}

    def _weight_of(self, tensors: dict[str, Tensor]) -> QuantizedWeight:
        return QuantizedWeight(
            spec=self.spec,
            out_features=self.out_features,
            in_features=self.in_features,
            tensors=tensors,
            leading=self.leading,
        )

    def _checked_dtypes(self, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """Dtypes of the product with ``x`` and of its result."""
        if x.dim() == 0 or x.shape[-1] != self.in_features or not x.is_floating_point():
            raise ValueError(
                f"{self.layer_name}: expected a floating input of shape (..., {self.in_features}), got {x.dtype} of "
                f"shape {tuple(x.shape)}."
            )
        codes = self._parameters[self.spec.codes_name]
        if codes is not None and codes.is_meta and not x.is_meta:
            raise RuntimeError(
                f"{self.layer_name}: its weight is on the meta device, without numbers. Load the weights first."
            )
        dtype, output_dtype = self.compute_dtype, x.dtype
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            dtype = output_dtype = torch.get_autocast_dtype(x.device.type)
        return dtype, output_dtype

    def _wrap_codes(self) -> None:
        codes = self.codes
        if type(codes) is nn.Parameter:
            codes = CodesParameter.around(codes, as_bytes(codes.data))
            self._parameters[self.spec.codes_name] = codes
        if not isinstance(codes, CodesParameter):  # a DTensor of FSDP2 or tensor parallelism keeps its own class
            return
        metadata = sum(self._parameter(name).nelement() for name in self._tensor_names if name != self.spec.codes_name)
        codes.n_weights = math.prod(self.leading) * self.in_features * self.out_features - metadata
        codes.layer_name = self.layer_name

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter) and name != "bias" and "_is_built" in self.__dict__:
            self._wrap_codes()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "_tensor_names" not in state:
            raise TypeError(
                f"{self.layer_name}: this layer was pickled by an earlier version of peft_quantlayers. Save the model "
                "with save_model, or the layer's state_dict, in that version, and load that."
            )
        if "_codes_dtype" not in state:  # pickled by an older version
            self._codes_dtype = self.codes.dtype
        self._wrap_codes()
        for other in self.sharing:  # whose codes were wrapped by themselves, if they were before these
            if self.spec.codes_name in vars(other).get("_parameters", ()):
                other._parameters[self.spec.codes_name] = self._parameter(self.spec.codes_name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=self.codes.device))
        stored = {id(self._parameters[name]) for name in self._tensor_names}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in stored and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_dtype, recurse)
        self.compute_dtype = probe.dtype
        self._wrap_codes()
        return self
