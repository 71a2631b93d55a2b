"""How an HQQ weight is stored, and the config that users pass."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from quantlayers_kernels.bitpack import SUPPORTED_NBITS, pack, packed_row_bytes, unpack

from ...arguments import check_choice, check_integer, check_number
from ...formats import QuantSpec, TensorLayout
from ...formats.quant_spec import Role, dtype_name, suggest_divisor, with_smaller_groups
from ..quant_config import QuantConfig
from .export_grids import Zeros, default_group_size, default_zeros, target_name, why_not

MAX_GROUP_SIZE = 1 << 24
# Fields that later format versions added, with the version, and the values that say what older ones mean.
_ADDED_FIELDS: dict[str, tuple[int, Any]] = {
    "symmetric": (6, False),
    "export_target": (6, None),
    "double_quant": (7, False),
}


@dataclass(frozen=True, kw_only=True)
class HQQSpec(QuantSpec):
    """An HQQ weight: ``(code - zero) * scale`` with one scale and one zero for each group.

    Fields:
        nbits: bits per code: 1, 2, 3, 4, 5, 6 or 8, packed without waste.
        group_size: weights that share a scale and a zero; None for a whole row (``axis=1``) or column (``axis=0``).
        axis: 1 groups neighbouring inputs of one output, 0 groups outputs of one input.
        scale_dtype: dtype in which scales and zeros are stored. A layer whose groups it cannot hold gets float32.
        integer_zero: zeros are integers, as integer formats need them.
        symmetric: all zeros are ``2 ** (nbits - 1)``, as symmetric formats need them, and none is stored; from 2 bits.
        double_quant: store scales and zeros in 8 bits, with a step and an offset in ``scale_dtype`` for each row: half
            the bits, so that groups of 32 take about those of groups of 64 without it. A layer whose rows hold scales
            that are too different for this is stored without. For up to 4 bits, float or symmetric zeros, ``axis=1``.
        export_target: a format or an engine of other packages (``export_grids.TARGETS``) that must hold the weight
            exactly, now and after every merge; None for no such limit. :meth:`HQQConfig.for_export` sets it.
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
    symmetric: bool = False
    double_quant: bool = False
    export_target: str | None = None
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
        check_choice("symmetric", self.symmetric, (False, True))
        check_choice("double_quant", self.double_quant, (False, True))
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
        if self.symmetric and self.nbits == 1:
            raise ValueError("symmetric=True needs nbits=2 or more: one bit would stand for 0 and for one sign only.")
        if self.double_quant:
            self._refuse_what_eight_bits_cannot_hold()
        if self.export_target is not None:
            object.__setattr__(self, "export_target", target_name(self.export_target))
            self._refuse_what_the_target_cannot_hold()

    def _refuse_what_eight_bits_cannot_hold(self) -> None:
        """Raise ValueError for a spec whose scales and zeros are not stored in 8 bits."""
        if self.axis != 1:
            raise ValueError("double_quant=True needs axis=1: each row has the step and the offset of its own groups.")
        if self.nbits > 4:
            raise ValueError(
                f"double_quant=True is for nbits up to 4: with {self.nbits}, rounding the scales to 8 bits would move "
                "weights as far as rounding them to codes. Leave it out where there are more bits."
            )
        if self.integer_zero:
            raise ValueError("double_quant=True is for float or symmetric zeros: leave integer_zero=False.")
        if self.export_target is not None:
            raise ValueError(
                f"double_quant=True with export_target={self.export_target!r}: the formats of other engines have "
                "plain scales. Leave double_quant out; an export writes plain ones in any case."
            )

    def _refuse_what_the_target_cannot_hold(self, in_features: int | None = None) -> None:
        """Raise ValueError where ``export_target`` does not hold weights of this spec, with ``in_features``."""
        reasons = why_not(self.export_target, self, in_features) if self.export_target is not None else []
        if reasons:
            raise ValueError(
                f"export_target={self.export_target!r} cannot hold such a weight exactly: {'; '.join(reasons)}."
            )

    @property
    def zeros(self) -> Zeros:
        """What the zero points are, the narrowest kind."""
        return "symmetric" if self.symmetric else "integer" if self.integer_zero else "float"

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
        self._refuse_what_the_target_cannot_hold(in_features)
        n_groups = self.n_groups(out_features, in_features)
        shape = (out_features, n_groups) if self.axis == 1 else (n_groups, in_features)
        # With axis=0 the rows of a group lie n_groups apart; ``sliced`` handles that.
        dtype = getattr(torch, self.scale_dtype)
        codes = (out_features, packed_row_bytes(in_features, self.nbits))
        layout = {"W_q": TensorLayout(shape=codes, dtype=torch.uint8, role="codes")}
        roles: dict[str, Role] = {"scale": "scales"} if self.symmetric else {"scale": "scales", "zero": "zeros"}
        for name, role in roles.items():
            layout[name] = TensorLayout(shape=shape, dtype=torch.uint8 if self.double_quant else dtype, role=role)
            if self.double_quant:
                row = TensorLayout(shape=(out_features, 1), dtype=dtype, role=role)
                layout |= {f"{name}_step": row, f"{name}_offset": row}
        return layout

    def fitted(self, out_features: int, in_features: int) -> Self | None:
        if not self.misfit(out_features, in_features):
            return self
        side = in_features if self.axis == 1 else out_features
        if self.export_target is not None:
            return self._fitted_to_target(side)
        return with_smaller_groups(self, "group_size", side, out_features, in_features)

    def _fitted_to_target(self, side: int) -> Self | None:
        """This spec with the largest groups that divide ``side`` and that the target holds; None if there are none."""
        for size in range(min(side, self.group_size or side), 0, -1):
            smaller = dataclasses.replace(self, group_size=size, export_target=None)
            if side % size == 0 and not why_not(str(self.export_target), smaller):
                return dataclasses.replace(smaller, export_target=self.export_target)
        return None

    def widened(self) -> Self:
        """As :meth:`QuantSpec.widened`; this spec as it is where the ``export_target`` does not hold float32."""
        wide = dataclasses.replace(self, scale_dtype="float32", export_target=None)
        if self.export_target is not None and why_not(self.export_target, wide):
            return self
        return dataclasses.replace(wide, export_target=self.export_target)

    def joined(self, n_weights: int, out_features: int, in_features: int) -> Self | None:
        return self if self.axis == 1 else None

    def to_dict(self) -> dict[str, Any]:
        """As :meth:`QuantSpec.to_dict`, without the fields that older versions do not know where they say nothing."""
        return {name: value for name, value in super().to_dict().items() if name not in self._silent_fields()}

    @property
    def format_version(self) -> int:
        silent = self._silent_fields()
        return max([1, *(version for name, (version, _) in _ADDED_FIELDS.items() if name not in silent)])

    def _silent_fields(self) -> set[str]:
        return {name for name, (_, value) in _ADDED_FIELDS.items() if getattr(self, name) == value}

    def with_plain_metadata(self) -> Self:
        """This spec with scales and zeros in ``scale_dtype``."""
        return dataclasses.replace(self, double_quant=False)

    def stored_forms(self) -> tuple[Self, ...]:
        """As :meth:`QuantSpec.stored_forms`: 8 bits, ``scale_dtype``, float32."""
        plain = self.with_plain_metadata()
        return tuple(dict.fromkeys((self, self.widened(), plain, plain.widened())))

    @property
    def symmetric_zero(self) -> int:
        """The zero point of all groups with ``symmetric``."""
        return 2 ** (self.nbits - 1)

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
        found |= {name: tensors[name].index_select(-2, groups) for name in ("scale", "zero") if name in tensors}
        return dataclasses.replace(self, group_size=1, export_target=None), found

    def trainable_roles(self, out_features: int, in_features: int) -> dict[str, Role]:
        found = super().trainable_roles(out_features, in_features)
        # Training would not keep integer zeros integer.
        return {name: role for name, role in found.items() if role != "zeros" or self.zeros == "float"}


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

    @classmethod
    def for_export(cls, target: str, *, nbits: int = 4, **fields: Any) -> Self:
        """A config whose weights another engine's format holds exactly, and goes on holding after every merge.

        The zero points are the most general kind that the target holds at this width: float where it has them,
        otherwise integer or symmetric ones. Groups have 64 weights, for GGUF 32, since it stores a scale for every 32
        weights in any case; larger groups are exact there too, by repeating their scale. Layers whose shape the format
        does not hold get smaller groups or stay dense (``on_misfit``).

        What would leave the grid later is refused, or stays on it: a merge keeps zeros and scales in the dtype that
        the format has, and tuned scales are trained as rounded to it.

        Args:
            target: a format ("gguf", "mlx", "compressed-tensors", "humming", "gptq", "awq", "onnx", "openvino",
                "torchao", "hqq") or an engine that reads one ("llama.cpp", "ollama", "vllm", "vllm-cpu", "sglang",
                ...). It is kept in the config, in each layer's spec and in saved models as ``export_target``.
            nbits: bits per code.
            fields: further fields of the config; ``integer_zero`` or ``symmetric`` for another kind of zero points.

        Raises:
            ValueError: an unknown target, with the nearest name; or a width, group size, axis or dtype that the target
                does not hold, with those that it holds.
            TypeError: an unknown field, or a value of the wrong type.
        """
        name = target_name(target)
        check_integer("nbits", nbits, at_least=1, at_most=max(SUPPORTED_NBITS))
        if not {"integer_zero", "symmetric"} & fields.keys():
            zeros = default_zeros(name, nbits)
            fields |= {"integer_zero": zeros == "integer", "symmetric": zeros == "symmetric"}
        return cls(**{"group_size": default_group_size(name)} | fields, nbits=nbits, export_target=name)
