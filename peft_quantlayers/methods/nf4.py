"""NF4: four bits whose 16 values are quantiles of a normal distribution, times the largest magnitude of each block.

One file is all of this method; it is also the example of ``docs/new_method.md``. The codes and block maxima are those
of bitsandbytes for the same block size. Its double quantization stores the block maxima in 8 bits by a table of its
own; here they are 8-bit integers with a float32 scale and offset for each row, whose rounding is at most 1/510 of the
range of the row's maxima.

Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs".
"""

from dataclasses import dataclass
from functools import cache
from typing import Self

import torch
from torch import Tensor

from quantlayers_kernels.bitpack import pack, packed_row_bytes, unpack

from ..arguments import check_choice, check_integer
from ..formats import QuantizedWeight, QuantSpec, TensorLayout
from ..formats.quant_spec import dtype_name, suggest_divisor, with_smaller_groups
from .base import InitialCodes, QuantMethod, checked_hessian, checked_layout, refuse_not_finite
from .error_feedback import round_with_feedback
from .quant_config import make_config
from .registry import register_method

# Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero: the table of the paper's appendix E.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
SWEEPS = 4


@dataclass(frozen=True, kw_only=True)
class NF4Spec(QuantSpec):
    """An NF4 weight: ``LEVELS[code] * absmax``.

    Fields:
        block_size: neighbouring inputs of a row that share a maximum.
        scale_dtype: dtype of the maxima, or of what they are computed from with ``double_quant``.
        double_quant: store the maxima in 8 bits.
    """

    method = "nf4"
    shown_fields = ("block_size", "double_quant")

    block_size: int = 64
    scale_dtype: str = "float32"
    double_quant: bool = False

    def __post_init__(self) -> None:
        check_integer("block_size", self.block_size, at_least=1, at_most=1 << 24)
        check_choice("double_quant", self.double_quant, (False, True))
        object.__setattr__(self, "scale_dtype", dtype_name("scale_dtype", self.scale_dtype))

    def tensor_layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        if in_features % self.block_size:
            raise ValueError(
                f"in_features={in_features} is not a multiple of block_size={self.block_size}. Use a block_size that "
                f"divides it (for example {suggest_divisor(in_features, self.block_size)})."
            )
        maxima, dtype = (out_features, in_features // self.block_size), getattr(torch, self.scale_dtype)
        codes = TensorLayout(shape=(out_features, packed_row_bytes(in_features, 4)), dtype=torch.uint8, role="codes")
        if not self.double_quant:
            return {"codes": codes, "absmax": TensorLayout(shape=maxima, dtype=dtype, role="scales")}
        return {
            "codes": codes,
            "absmax": TensorLayout(shape=maxima, dtype=torch.uint8, role="scales"),
            "absmax_scale": TensorLayout(shape=(out_features, 1), dtype=dtype, role="scales"),
            "absmax_offset": TensorLayout(shape=(out_features, 1), dtype=dtype, role="scales"),
        }

    def fitted(self, out_features: int, in_features: int) -> Self | None:
        if not self.misfit(out_features, in_features):
            return self
        return with_smaller_groups(self, "block_size", in_features, out_features, in_features)

    @property
    def max_code(self) -> int:
        return len(LEVELS) - 1

    def unpack_codes(self, codes: Tensor, in_features: int) -> Tensor:
        return unpack(codes.reshape(-1, codes.shape[-1]), 4, in_features).view(*codes.shape[:-1], in_features)

    def pack_codes(self, codes: Tensor) -> Tensor:
        return pack(codes.reshape(-1, codes.shape[-1]), 4).view(*codes.shape[:-1], -1)


NF4Config = make_config(NF4Spec)


class NF4Method(QuantMethod[NF4Spec]):
    """4-bit NormalFloat. With a Hessian, each column's codes are chosen with all others fixed; the maxima stay."""

    spec_type = NF4Spec
    has_independent_rows = True
    initial_codes = ("nearest", "error_feedback", "act_order")

    def quantize(
        self,
        weight: Tensor,
        spec: NF4Spec,
        *,
        hessian: Tensor | None = None,
        start: QuantizedWeight | None = None,
        iterations: int | None = None,
        initial_codes: InitialCodes = "nearest",
    ) -> QuantizedWeight:
        """As :meth:`QuantMethod.quantize`; with ``start`` the block maxima stay, and only the codes are new."""
        checked_layout(weight, spec)
        weight = weight.detach().float()
        refuse_not_finite(weight)
        grid = _with_maxima(weight, spec) if start is None else start.to(weight.device)
        steps = _maxima(grid).repeat_interleave(spec.block_size, 1)
        codes = _nearest(weight, steps)
        if hessian is not None:
            hessian = checked_hessian(hessian, weight)
            if start is not None:
                codes = grid.codes()
            elif initial_codes != "nearest":
                codes = _with_feedback(weight, steps, hessian, act_order=initial_codes == "act_order")
            codes = _descended(weight, codes, steps, hessian)
        return grid.with_codes(codes)

    def can_use_hessian(self, spec: NF4Spec) -> bool:
        return True

    def dequantize(self, weight: QuantizedWeight, *, dtype: torch.dtype = torch.float32) -> Tensor:
        values = _levels(weight.tensors["codes"].device)[weight.codes().long()]
        blocks = values.view(weight.out_features, -1, weight.spec.block_size)  # type: ignore[attr-defined]
        return (blocks * _maxima(weight)[..., None]).view(values.shape).to(dtype)


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


def _maxima(weight: QuantizedWeight) -> Tensor:
    """(out_features, n_blocks), float32, differentiable in the floating tensors."""
    tensors = weight.tensors
    if "absmax_scale" not in tensors:
        return tensors["absmax"].float()
    return tensors["absmax"] * tensors["absmax_scale"].float() + tensors["absmax_offset"].float()


def _with_maxima(weight: Tensor, spec: NF4Spec) -> QuantizedWeight:
    """The block maxima of ``weight`` as ``spec`` stores them, in float32 where its dtype cannot; codes are all 0."""
    maxima, dtype = weight.view(len(weight), -1, spec.block_size).abs().amax(2), getattr(torch, spec.scale_dtype)
    if not maxima.any():  # any maximum stands for zeros, and none but zeros would look like a damaged file
        maxima = torch.ones_like(maxima)
    tensors = {"codes": weight.new_zeros(len(weight), packed_row_bytes(weight.shape[1], 4), dtype=torch.uint8)}
    if spec.double_quant:
        low, high = maxima.aminmax(dim=1, keepdim=True)
        tensors |= {"absmax_scale": ((high - low) / 255).to(dtype), "absmax_offset": low.to(dtype)}
        scale, offset = (tensors[name].float() for name in ("absmax_scale", "absmax_offset"))
        tensors["absmax"] = ((maxima - offset) / scale.clamp(min=1e-30)).round_().clamp_(0, 255).to(torch.uint8)
    else:
        tensors["absmax"] = maxima.to(dtype)
    found = QuantizedWeight(spec=spec, out_features=weight.shape[0], in_features=weight.shape[1], tensors=tensors)
    is_kept = (_maxima(found) - maxima).norm() <= 0.01 * maxima.norm()
    return found if is_kept or spec == spec.widened() else _with_maxima(weight, spec.widened())


def _nearest(weight: Tensor, steps: Tensor) -> Tensor:
    """Codes (uint8) of the levels nearest to ``weight``, whose blocks have the maxima ``steps``; all of one shape."""
    levels = _levels(weight.device)
    scaled = torch.where(steps > 0, weight / steps.clamp(min=1e-38), 0.0)
    return torch.bucketize(scaled.contiguous(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def _with_feedback(weight: Tensor, steps: Tensor, hessian: Tensor, *, act_order: bool) -> Tensor:
    """Codes (uint8) rounded with error feedback; arguments as for :func:`_descended`."""
    levels = _levels(weight.device)
    codes = torch.empty_like(weight, dtype=torch.uint8)

    def rounded(target: Tensor, column: int) -> Tensor:
        codes[:, column] = _nearest(target, steps[:, column])
        return levels[codes[:, column].long()] * steps[:, column]

    round_with_feedback(weight, hessian, rounded, act_order=act_order)
    return codes


def _descended(weight: Tensor, codes: Tensor, steps: Tensor, hessian: Tensor) -> Tensor:
    """Codes with a lower output error: each column's in turn, with all others fixed, ``SWEEPS`` times."""
    levels, codes = _levels(weight.device), codes.clone()
    residual = weight - levels[codes.long()] * steps
    for column in list(range(weight.shape[1])) * SWEEPS:
        target = weight[:, column] + (residual @ hessian[:, column]) / hessian[column, column] - residual[:, column]
        codes[:, column] = _nearest(target, steps[:, column])
        residual[:, column] = weight[:, column] - levels[codes[:, column].long()] * steps[:, column]
    return codes


register_method(NF4Method())
