"""What a quantization method is.

A method is one frozen spec, a ``quantize``, a ``dequantize`` and a ``linear``. Layer, LoRA, merging, saving and
loading, command line and contract tests follow from its registration.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor

from quantlayers_kernels.tiled import WeightTiles

from ..formats import QuantizedWeight, QuantSpec, TensorLayout

SpecT = TypeVar("SpecT", bound=QuantSpec)


class QuantMethod(ABC, Generic[SpecT]):
    """Quantizes weights of one kind. Stateless: every function takes what it needs and writes into nothing."""

    spec_type: ClassVar[type[QuantSpec]]
    # Whether ``quantize`` with ``start`` betters all of it, its grid too, and so errs less than from scratch.
    improves_start: ClassVar[bool] = False

    @abstractmethod
    def quantize(
        self,
        weight: Tensor,
        spec: SpecT,
        *,
        name: str,
        hessian: Tensor | None = None,
        start: QuantizedWeight | None = None,
        rounds: int | None = None,
    ) -> QuantizedWeight:
        """Quantize ``weight`` (out_features, in_features), any floating dtype, on its own device.

        The spec of the result may differ from ``spec`` where the weight asks for it (wider metadata).

        Args:
            weight: what to quantize.
            spec: how.
            name: the layer's name, for messages.
            hessian: second moment ``E[x x.T]`` of the layer's inputs, (in_features, in_features), float32. With it
                the error that counts is that of the outputs, ``tr(D H D.T)``; without, that of the weight. A method
                that cannot use it ignores it.
            start: a quantized weight of the same layer and spec to begin from: what it shares with ``weight`` is
                kept, its grid or its codes. A method that cannot use it ignores it.
            rounds: how often codes and the rest are fitted in turn, with ``hessian``; None for the method's own.

        Raises:
            ValueError: the shape does not fit the spec, or the weight holds NaN or Inf; names ``name``.
        """

    def can_use_hessian(self, spec: SpecT) -> bool:
        """Whether :meth:`quantize` makes use of a Hessian for this spec."""
        return False

    @abstractmethod
    def dequantize(
        self, tensors: Mapping[str, Tensor], spec: SpecT, *, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        """The dense weight (out_features, in_features) in ``dtype``, differentiable in the floating tensors."""

    def dense(self, weight: QuantizedWeight) -> Tensor:
        """What ``weight`` stands for, (out_features, in_features), float32."""
        spec = cast(SpecT, weight.spec)
        return self.dequantize(weight.tensors, spec, in_features=weight.in_features, dtype=torch.float32)

    @abstractmethod
    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], spec: SpecT, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``: (..., in_features) to (..., out_features), dtype of ``x``."""

    def weight_tiles(
        self, tensors: Mapping[str, Tensor], spec: SpecT, *, in_features: int, dtype: torch.dtype
    ) -> WeightTiles:
        """Row ranges of the dense weight with their values in ``dtype``, whose memory the next may reuse.

        Here it is all rows at once. A method that dequantizes rows by themselves needs no dense weight for this.
        """
        weight = self.dequantize(tensors, spec, in_features=in_features, dtype=dtype)
        yield slice(0, weight.shape[0]), weight

    def merged(self, weight: QuantizedWeight, change: Callable[[slice], Tensor], *, name: str) -> QuantizedWeight:
        """``weight`` plus ``change``, beginning from the codes that it has; no change gives the same bits.

        Here it is quantized anew with ``weight`` as the start. A method that rounds a change into its codes better
        than that does so, and offers :meth:`merged_tiles` for training through the same rounding.

        Args:
            weight: what to change; it is left as it is.
            change: rows of the change for a range of rows, (n, in_features), float32, finite.
            name: the layer's name, for messages.
        """
        whole = change(slice(0, weight.out_features))
        if not whole.any():
            return weight
        return self.quantize(self.dense(weight) + whole, cast(SpecT, weight.spec), name=name, start=weight)

    @property
    def rounds_by_tiles(self) -> bool:
        """Whether :meth:`merged_tiles` is there."""
        return type(self).merged_tiles is not QuantMethod.merged_tiles

    def merged_tiles(
        self,
        tensors: Mapping[str, Tensor],
        spec: SpecT,
        change: Callable[[slice], Tensor],
        *,
        in_features: int,
        dtype: torch.dtype,
    ) -> WeightTiles:
        """Row ranges of the dense weight that :meth:`merged` gives, with their tiles in ``dtype``, one at a time."""
        raise NotImplementedError(f"{spec.method} weights are not rounded tile by tile.")

    def shift_group_size(self, spec: SpecT, *, in_features: int) -> int:
        """How many neighbouring inputs of a row share an offset that can take any value: see :meth:`shifted`.

        Raises:
            NotImplementedError: weights of ``spec`` have no such offset; says why.
        """
        raise NotImplementedError(f"{spec.method} weights have no offset for each group that could take any value.")

    def shifted(self, weight: QuantizedWeight, change: Tensor, *, name: str) -> QuantizedWeight:
        """``weight`` plus a change that is constant in each group, without rounding any code.

        Args:
            weight: what to change; it is left as it is.
            change: weight units, (out_features, n_groups), float32; groups of :meth:`shift_group_size`.
            name: the layer's name, for messages.

        Raises:
            NotImplementedError: as :meth:`shift_group_size`.
            ValueError: the change holds NaN or Inf; names ``name``.
        """
        raise NotImplementedError(f"{name}: {weight.spec.method} weights cannot be shifted group by group.")


def checked_layout(weight: Tensor, spec: QuantSpec, *, name: str) -> dict[str, TensorLayout]:
    """Layout of ``weight`` (out_features, in_features); ValueError with layer and remedy where it does not fit."""
    try:
        return spec.tensor_layout(*weight.shape)
    except ValueError as error:
        raise ValueError(f"{name}: {error} Or skip the layer with skip_modules=[{name!r}].") from None


def refuse_not_finite(weight: Tensor, *, name: str) -> None:
    """Raise ValueError with layer and remedy where ``weight`` holds NaN or Inf."""
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"{name}: the weight holds NaN or Inf, which no code can stand for. Repair the checkpoint, or "
            f"skip the layer with skip_modules=[{name!r}]."
        )


def checked_hessian(hessian: Tensor, weight: Tensor, *, name: str) -> Tensor:
    """``hessian`` on the device of ``weight``; ValueError unless it is a finite float32 second moment of inputs."""
    in_features = weight.shape[1]
    if tuple(hessian.shape) != (in_features, in_features) or hessian.dtype != torch.float32:
        raise ValueError(
            f"{name}: the Hessian must be float32 of shape {(in_features, in_features)}, got {hessian.dtype} of shape "
            f"{tuple(hessian.shape)}."
        )
    if not (torch.isfinite(hessian).all() and (hessian.diagonal() > 0).all()):
        raise ValueError(
            f"{name}: the Hessian holds NaN or Inf, or its diagonal a value that is not positive: some input was "
            "never seen. Calibrate on more text, or with more damping."
        )
    return hessian.to(weight.device)
