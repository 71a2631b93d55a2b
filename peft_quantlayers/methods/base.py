"""The base class of quantization methods.

A method is a frozen spec, a ``quantize`` and a ``dequantize``. Once it is registered, layers, LoRA, merging, saving
and loading, tuned scales and the contract tests work with it; see ``docs/new_method.md``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar, Generic, Literal, TypeVar, cast

import torch
from torch import Tensor

from quantlayers_kernels.frozen_experts import expert_rows
from quantlayers_kernels.precision import product_dtype
from quantlayers_kernels.prepared import PreparedProduct
from quantlayers_kernels.straight_through import straight_through_linear
from quantlayers_kernels.tiled import WeightTiles, input_gradient, row_ranges
from quantlayers_kernels.tiled_linear import tiled_linear

from ..formats import QuantizedWeight, QuantSpec, TensorLayout
from ..old_names import OldName
from .dithered_codes import dithered_codes

SpecT = TypeVar("SpecT", bound=QuantSpec)

# Where the codes of a calibrated weight begin: at the nearest values, or rounded with error feedback, in the order of
# the columns or those of large inputs first.
InitialCodes = Literal["nearest", "error_feedback", "act_order"]

# Rows of a delta for a range of rows: (n, in_features), float32, finite, in weight units.
DeltaRows = Callable[[slice], Tensor]


class QuantMethod(ABC, Generic[SpecT]):
    """Quantizes weights of one kind. Stateless: every function takes what it needs and changes no argument.

    A method does not know layer names; the layer adds its name to the method's errors.
    """

    dense = OldName("dequantize")
    shift_group_size = OldName("group_delta_size")

    spec_type: ClassVar[type[QuantSpec]]
    has_independent_rows: ClassVar[bool] = False
    """Whether some rows of a weight, quantized by themselves, are as in the whole weight."""
    improves_start: ClassVar[bool] = False
    """Whether ``quantize`` with ``start`` also refines the grid, so that its error is lower than from scratch."""
    initial_codes: ClassVar[tuple[InitialCodes, ...]] = ("nearest",)
    """The values of ``initial_codes`` that :meth:`quantize` takes; it needs no such argument for "nearest" alone."""
    calibration_requirement: ClassVar[str] = "This method has no calibrated quantizer."
    """A sentence for error messages: why a spec of this method cannot use a Hessian, and what to do."""

    @abstractmethod
    def quantize(
        self,
        weight: Tensor,
        spec: SpecT,
        *,
        hessian: Tensor | None = None,
        start: QuantizedWeight | None = None,
        iterations: int | None = None,
    ) -> QuantizedWeight:
        """Quantize ``weight`` (out_features, in_features), any floating dtype, on its own device.

        ======================= =====================================================================
        ``weight`` alone        grid and codes of the lowest weight error
        ``start``               codes for the grid of ``start``, or a fit of both that begins there
        ``hessian``             grid and codes of the lowest output error
        ``hessian``, ``start``  the same, beginning from ``start``
        ======================= =====================================================================

        The spec of the result may differ from ``spec`` where the weight needs it (wider metadata).

        Args:
            weight: what to quantize.
            spec: how.
            hessian: second moment ``E[x x.T]`` of the layer's inputs, (in_features, in_features), float32. If given,
                minimises the output error ``tr(D H D.T)`` instead of the weight error. A method that cannot use it
                ignores it.
            start: a quantized weight of the same shape and spec to start from: the method keeps or refines its grid
                or its codes. A method that cannot use it ignores it.
            iterations: how often codes and grid are fitted in turn, with ``hessian``; None for the method's default.

        Raises:
            ValueError: the shape does not fit the spec, or the weight holds NaN or Inf.
        """

    def can_use_hessian(self, spec: SpecT) -> bool:
        """Whether :meth:`quantize` uses a Hessian for this spec."""
        return False

    @abstractmethod
    def dequantize(self, weight: QuantizedWeight, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight of ``weight`` (one weight, no stack): (out_features, in_features) in ``dtype``.

        Differentiable in the tensors that the spec's ``trainable_roles`` names. For some rows only, call
        ``dequantize(weight.rows(slice(a, b)))``.
        """

    def linear(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``: (..., in_features) to (..., out_features), dtype of ``x``.

        By default a range of rows is dequantized at a time, again in the backward pass, so that no dense weight is
        ever in memory.
        """

        def dequantize_rows(tensors: Mapping[str, Tensor], rows: slice, dtype: torch.dtype) -> Tensor:
            return self.dequantize(_with_tensors(weight, tensors).rows(rows), dtype=dtype)

        return tiled_linear(
            x,
            weight.tensors,
            dequantize_rows,
            bias,
            out_features=weight.out_features,
            multiple=weight.row_multiple,
        )

    def with_plain_metadata(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The same weight, to the bit, with metadata that are not quantized themselves."""
        return weight

    def rounding_misfit(self, spec: SpecT) -> str | None:
        """Why :meth:`linear` cannot round activations to 8 bits.

        None where it can; it takes ``activation_bits`` then, and :meth:`prepared_product` too.
        """
        return f"{spec.method} weights have no product with rounded activations"

    def prepared_product(self, weight: QuantizedWeight) -> PreparedProduct | None:
        """:meth:`linear` with ``weight`` for few tokens and without gradients, its arguments checked now.

        By default None: :meth:`linear` is called. The result knows where the tensors of ``weight`` lie.
        """
        return None

    def weight_tiles(self, weight: QuantizedWeight, *, dtype: torch.dtype) -> WeightTiles:
        """Row ranges of the dense weight with their values in ``dtype``, whose memory the next range may reuse."""
        for rows in _row_ranges(weight):
            yield rows, self.dequantize(weight.rows(rows), dtype=dtype)

    # ---- stacks of experts

    def experts_linear(self, x: Tensor, weight: QuantizedWeight, counts: Sequence[int]) -> Tensor:
        """``x @ weight[e].T`` with each token's own expert; takes no gradient. In memory of its own.

        Args:
            x: (n_tokens, in_features), sorted by expert.
            weight: a stack, with one leading dimension.
            counts: tokens of each expert.

        Returns:
            (n_tokens, out_features), dtype of ``x``.
        """
        y = x.new_empty(len(x), weight.out_features)
        for expert, rows in expert_rows(counts):
            y[rows] = self.linear(x[rows], weight[expert], None)
        return y

    def experts_input_gradient(self, grad: Tensor, weight: QuantizedWeight, counts: Sequence[int]) -> Tensor:
        """``grad @ weight[e]``: (n_tokens, out_features) to (n_tokens, in_features); as :meth:`experts_linear`."""
        dtype = product_dtype(grad.dtype, grad.device)
        grad_x = grad.new_empty(len(grad), weight.in_features)
        for expert, rows in expert_rows(counts):
            tiles = self.weight_tiles(weight[expert], dtype=dtype)
            grad_x[rows] = input_gradient(grad[rows], tiles, weight.in_features, dtype)
        return grad_x

    # ---- merging a delta

    def merged(self, weight: QuantizedWeight, delta: DeltaRows) -> QuantizedWeight:
        """``weight`` plus a delta, on its own grid; where the delta is zero, codes stay as they are.

        By default each code is one of the two around the target, chosen by a fixed dither so that the delta is right
        on average: nearest codes would lose a delta that is much smaller than a step. A method whose codes name
        entries of a codebook is quantized with ``weight`` as the start instead, unless it overrides this.

        Args:
            weight: what to add to; not changed.
            delta: rows of the delta.
        """
        if weight.spec.max_code is None:
            whole = delta(slice(0, weight.out_features))
            if not whole.any():
                return weight
            return self.quantize(self.dequantize(weight) + whole, cast(SpecT, weight.spec), start=weight)
        codes = weight.codes().clone()
        for rows in _row_ranges(weight):
            codes[rows] = dithered_codes(
                codes[rows],
                delta(rows),
                partial(self._values, weight.rows(rows)),
                max_code=weight.spec.max_code,
                first_row=rows.start,
            )
        return weight.with_codes(codes)

    def _values(self, weight: QuantizedWeight, codes: Tensor) -> Tensor:
        return self.dequantize(weight.with_codes(codes))

    @property
    def rounds_by_tiles(self) -> bool:
        """Whether :meth:`merged_tiles` is implemented."""
        return type(self).merged_tiles is not QuantMethod.merged_tiles

    def merged_tiles(self, weight: QuantizedWeight, delta: DeltaRows, *, dtype: torch.dtype) -> WeightTiles:
        """Row ranges of the dense weight that :meth:`merged` gives, with their values in ``dtype``, one at a time.

        For merge-aware training, where :meth:`merged` is fast enough to run in every pass.
        """
        raise NotImplementedError(f"{weight.spec.method} weights are not rounded tile by tile.")

    def merged_linear(
        self, x: Tensor, weight: QuantizedWeight, left: Tensor, right: Tensor, bias: Tensor | None
    ) -> Tensor:
        """What :meth:`linear` will give once ``left @ right`` is merged by :meth:`merged`: to the bit, by its tiles.

        The gradient of the two factors passes straight through the rounding.

        Args:
            x: (..., in_features), floating.
            weight: one that :meth:`merged_tiles` takes.
            left: (out_features, r), float32.
            right: (r, in_features), float32.
            bias: (out_features,) or None.
        """

        def tiles(left: Tensor, right: Tensor, dtype: torch.dtype) -> WeightTiles:
            return self.merged_tiles(weight, lambda rows: left[rows] @ right, dtype=dtype)

        return straight_through_linear(x, left, right, bias, weight.out_features, tiles)

    def group_delta_size(self, spec: SpecT, *, in_features: int) -> int:
        """How many neighbouring inputs of a row share an unrounded offset; see :meth:`with_group_delta`.

        Raises:
            NotImplementedError: weights of ``spec`` have no such offset; says why and what to quantize with instead.
        """
        raise NotImplementedError(f"{spec.method} weights have no offset for each group that could take any value.")

    def with_group_delta(self, weight: QuantizedWeight, delta: Tensor) -> QuantizedWeight:
        """``weight`` plus a delta that is constant in each group, folded into the groups' offsets: no code changes.

        Args:
            weight: what to add to; not changed.
            delta: weight units, (out_features, n_groups), float32; groups of :meth:`group_delta_size`.

        Raises:
            NotImplementedError: as :meth:`group_delta_size`.
            ValueError: the delta holds NaN or Inf.
        """
        raise NotImplementedError(f"{weight.spec.method} weights have no offset for each group.")


def _row_ranges(weight: QuantizedWeight) -> Iterator[slice]:
    device = weight.tensors[weight.spec.codes_name].device
    return row_ranges(weight.out_features, weight.in_features, device, multiple=weight.row_multiple)


def _with_tensors(weight: QuantizedWeight, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    return QuantizedWeight(
        spec=weight.spec,
        out_features=weight.out_features,
        in_features=weight.in_features,
        tensors=dict(tensors),
    )


def checked_layout(weight: Tensor, spec: QuantSpec) -> dict[str, TensorLayout]:
    """Layout of ``weight`` (out_features, in_features). Raises ValueError if its shape does not fit."""
    return spec.tensor_layout(*weight.shape)


def refuse_not_finite(weight: Tensor) -> None:
    """Raise ValueError if ``weight`` holds NaN or Inf."""
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or Inf, which no code can stand for. Repair the checkpoint.")


def checked_hessian(hessian: Tensor, weight: Tensor) -> Tensor:
    """``hessian`` on the device of ``weight``; ValueError unless it is a finite float32 second moment of inputs."""
    in_features = weight.shape[1]
    if tuple(hessian.shape) != (in_features, in_features) or hessian.dtype != torch.float32:
        raise ValueError(
            f"the Hessian must be float32 of shape {(in_features, in_features)}, got {hessian.dtype} of shape "
            f"{tuple(hessian.shape)}."
        )
    if not (torch.isfinite(hessian).all() and (hessian.diagonal() > 0).all()):
        raise ValueError(
            "the Hessian holds NaN or Inf, or a value on its diagonal that is not positive: some input was never "
            "seen. Calibrate on more text, or with more damping."
        )
    return hessian.to(weight.device)
