"""How an HQQ weight is stored, and the config that users pass."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from quantlayers_kernels.bitpack import SUPPORTED_NBITS, pack, packed_row_bytes, unpack

from ...arguments import check_choice, check_integer, check_number
from ...formats import QuantSpec, TensorLayout
from ...formats.spec import Role, dtype_name, suggest_divisor, with_smaller_groups
from ..quant_config import QuantConfig

MAX_GROUP_SIZE = 1 << 24


@dataclass(frozen=True, kw_only=True)
class HQQSpec(QuantSpec):
    """An HQQ weight: ``(code - zero) * scale`` with one scale and one zero for each group.

    Fields:
        nbits: bits per code: 1, 2, 3, 4, 5, 6 or 8, packed without waste.
        group_size: weights that share a scale and a zero; None for a whole row (``axis=1``) or column (``axis=0``).
        axis: 1 groups neighbouring inputs of one output, 0 groups outputs of one input.
        scale_dtype: dtype in which scales and zeros are stored. A layer whose groups it cannot hold gets float32.
        integer_zero: zeros are integers, as integer formats need them.
        round_zero: start the published iteration from a rounded zero, as the ``hqq`` package does at 4 bits.
        refine_scale: fit scale and zero to the codes by least squares after the published iteration.
        iters, lp_norm, beta, kappa: constants of the published iteration.
    """

    method = "hqq"
    codes_name = "W_q"
    shown_fields = ("nbits", "group_size", "axis")

    nbits: int = 4
    group_size: int | None = 64
    axis: int = 1
    scale_dtype: str = "float16"
    integer_zero: bool = False
    round_zero: bool = True
    refine_scale: bool = True
    iters: int = 20
    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01

    def __post_init__(self) -> None:
        check_choice("nbits", self.nbits, SUPPORTED_NBITS)
        check_choice("axis", self.axis, (0, 1))
        object.__setattr__(self, "scale_dtype", dtype_name("scale_dtype", self.scale_dtype))
        check_choice("integer_zero", self.integer_zero, (False, True))
        check_choice("round_zero", self.round_zero, (False, True))
        check_choice("refine_scale", self.refine_scale, (False, True))
        check_integer("iters", self.iters, at_least=0, at_most=10_000)
        check_number("lp_norm", self.lp_norm, above=0.0, at_most=1.0)
        check_number("beta", self.beta, above=0.0, at_most=1e6)
        check_number("kappa", self.kappa, above=0.0, at_most=10.0)
        if self.group_size == -1:
            raise ValueError("group_size=-1 is not supported; write None for one group a row (axis=1) or column.")
        if self.group_size is not None:
            check_integer("group_size", self.group_size, at_least=1, at_most=MAX_GROUP_SIZE)

    def n_groups(self, out_features: int, in_features: int) -> int:
        """Groups along ``axis``. Raises ValueError where ``group_size`` does not divide it."""
        size, side = (in_features, "in_features") if self.axis == 1 else (out_features, "out_features")
        if self.group_size is None:
            return 1
        if size % self.group_size:
            raise ValueError(
                f"{side}={size} is not a multiple of group_size={self.group_size}. Use a group_size that divides "
                f"it (for example {suggest_divisor(size, self.group_size)}), or group_size=None for one group."
            )
        return size // self.group_size

    def tensor_layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        n_groups = self.n_groups(out_features, in_features)
        shape = (out_features, n_groups) if self.axis == 1 else (n_groups, in_features)
        # With axis=0 the rows of a group lie n_groups apart; ``sliced`` handles that.
        metadata = {"shape": shape, "dtype": getattr(torch, self.scale_dtype)}
        return {
            "W_q": TensorLayout(
                shape=(out_features, packed_row_bytes(in_features, self.nbits)), dtype=torch.uint8, role="codes"
            ),
            "scale": TensorLayout(**metadata, role="scales"),
            "zero": TensorLayout(**metadata, role="zeros"),
        }

    def fitted(self, out_features: int, in_features: int) -> Self | None:
        if not self.misfit(out_features, in_features):
            return self
        side = in_features if self.axis == 1 else out_features
        return with_smaller_groups(self, "group_size", side, out_features, in_features)

    @property
    def max_code(self) -> int:
        return 2**self.nbits - 1

    def unpack_codes(self, codes: Tensor, in_features: int) -> Tensor:
        unpacked = unpack(codes.reshape(-1, codes.shape[-1]), self.nbits, in_features)
        return unpacked.view(*codes.shape[:-1], in_features)

    def pack_codes(self, codes: Tensor) -> Tensor:
        packed = pack(codes.reshape(-1, codes.shape[-1]).to(torch.uint8), self.nbits)
        return packed.view(*codes.shape[:-1], packed.shape[-1])

    def sliced(
        self, tensors: Mapping[str, Tensor], rows: slice, *, out_features: int, in_features: int
    ) -> tuple["HQQSpec", dict[str, Tensor]]:
        """As :meth:`QuantSpec.sliced`; with ``axis=0`` each row gets its own scales and zeros (``group_size=1``)."""
        if self.axis == 1:
            return super().sliced(tensors, rows, out_features=out_features, in_features=in_features)
        n_groups = self.n_groups(out_features, in_features)
        groups = torch.arange(rows.start, rows.stop, device=tensors["scale"].device) % n_groups
        found = {"W_q": tensors["W_q"].narrow(-2, rows.start, rows.stop - rows.start)}
        found |= {name: tensors[name].index_select(-2, groups) for name in ("scale", "zero")}
        return dataclasses.replace(self, group_size=1), found

    def trainable_roles(self, out_features: int, in_features: int) -> dict[str, Role]:
        # Training would not keep integer zeros integer.
        return {"scale": "scales"} if self.integer_zero else {"scale": "scales", "zero": "zeros"}


@dataclass(frozen=True, kw_only=True)
class HQQConfig(QuantConfig, HQQSpec):
    """Quantize a model with HQQ. Fields: those of :class:`HQQSpec` and of :class:`QuantConfig`.

    Accepted by :func:`peft_quantlayers.quantize_model` and by transformers'
    ``from_pretrained(..., quantization_config=)``.

    Raises:
        ValueError: a value that is not supported.
        TypeError: a value of the wrong type.
    """

    spec_type = HQQSpec
