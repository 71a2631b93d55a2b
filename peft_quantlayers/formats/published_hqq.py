"""Reads HQQ layers as the ``hqq`` package and transformers 4 wrote them. Nothing from the file is executed.

Layout (hqq 0.2, ``Quantizer`` and ``BitPack``): the weight is reshaped to groups, (n_groups, group_size) for
``axis=1`` and (group_size, n_groups) for ``axis=0``, and packed along its rows: with ``R`` rows and ``f`` codes a
word, row ``i`` lies in packed row ``i % (R / f)``, the first block in the highest bits. ``scale`` and ``zero``
have one entry a group. Beside the tensors each layer carries its own settings, as values (hqq's ``qmodel.pt``)
or as small tensors (safetensors): integers as they are, strings and dtypes as ASCII bytes.

Older releases also kept all but ``W_q`` under one key ``meta``, quantized scale and zero in turn (``scale_q`` with
its own ``meta_scale``, ``zero_q`` likewise), or stacked the two as ``zero_scale``; those are read as well.

Reading is two steps: :func:`describe_hqq_layer` needs settings, shapes and dtypes only, and gives the spec of the
layer; :meth:`StoredHqqLayer.convert` turns one tensor at a time into the layout of that spec.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checkpoint_format import (
    CheckpointFormat,
    CheckpointTensors,
    ModelDescription,
    SpecFromDict,
    TensorHeader,
)
from .quant_spec import QuantSpec

# packing name: (dtype of a word, codes a word, bits between two codes of a word)
PACKINGS = {
    "8bit_u8": (torch.uint8, 1, 8),
    "4bit_u8": (torch.uint8, 2, 4),
    "3bit_32": (torch.int32, 10, 3),
    "2bit_u8": (torch.uint8, 4, 2),
    "1bit_u8": (torch.uint8, 8, 1),
}
_BITS = {"4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2, "1bit_u8": 1}
_PARTS = ("W_q", "scale", "zero")


class PublishedHqqFormat(CheckpointFormat):
    """Checkpoints of quant_method "hqq"; read only. Each layer's settings lie beside its tensors."""

    name = "hqq"
    setting_names = (
        "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale",
        "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
        "optimize", "round_zero",
    )  # fmt: skip

    def can_hold(self, description: ModelDescription) -> str | None:
        return "this format is read and not written."

    def write(self, description: ModelDescription) -> dict[str, Any]:
        raise NotImplementedError('checkpoints of quant_method "hqq" are read and not written.')

    def read(
        self, fields: Mapping[str, Any], tensors: CheckpointTensors, *, spec_from_dict: SpecFromDict
    ) -> ModelDescription:
        names = _layer_names(tensors.headers)
        stored: dict[str, dict[str, Any]] = {
            name: {part: tensors.headers[f"{name}.{part}"] for part in _PARTS} for name in names
        }
        for key in tensors.headers:
            name, _, entry = key.rpartition(".")
            if name in stored and entry in self.setting_names:
                stored[name][entry] = tensors.read(key)
        layers = {}
        for name, entries in stored.items():
            if _needs_codes(entries, name):
                entries["W_q"] = tensors.read(f"{name}.W_q")
            layers[name] = describe_hqq_layer(entries, name=name, spec_from_dict=spec_from_dict)
        specs = {name: layer.spec for name, layer in layers.items()}
        return ModelDescription(specs=specs, stored_layers=layers)


@dataclass(frozen=True, kw_only=True)
class StoredHqqLayer:
    """How one layer is stored.

    Fields:
        shape: (out_features, in_features).
        axis: 1 if groups run along the inputs, 0 if along the outputs.
        packing: a key of ``PACKINGS``.
        stored_group_size: weights per stored scale; with ``axis=1`` a group may run over the end of a row.
        spec: of our layout. It may have fewer bits per code than the packing, and smaller groups.
    """

    shape: tuple[int, int]
    axis: int
    packing: str
    stored_group_size: int
    spec: QuantSpec

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """All tensors of our layout, which have the names of the stored ones."""
        return _PARTS

    def convert(self, tensor_name: str, stored: Tensor) -> Tensor:
        """The tensor ``tensor_name`` of our layout, from the stored one; both on the same device.

        ``W_q`` is unpacked and packed again. ``scale`` and ``zero`` keep their dtype and values, with one entry per
        group of :attr:`spec`.
        """
        out_features, in_features = self.shape
        if tensor_name == "W_q":
            codes = _unpack(stored, self.packing, _code_rows(self.axis, self.shape, self.stored_group_size))
            return self.spec.pack_codes(codes.reshape(self.shape))
        if self.axis == 0:
            return stored.reshape(-1, in_features).contiguous()
        return (
            stored.reshape(-1)
            .repeat_interleave(self.stored_group_size // _group_size(self.axis, self.shape, self.stored_group_size))
            .view(out_features, -1)
        )


def flattened(stored: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    """The entries of a layer without the nesting of older releases: ``scale`` and ``zero`` are plain tensors.

    Raises:
        ValueError: ``scale`` or ``zero`` is missing, or has a layout that no release wrote.
    """
    if isinstance(stored.get("meta"), Mapping):
        stored = {**stored["meta"], **stored}
    return {**stored} | {part: _metadata(stored, part, name) for part in ("scale", "zero")}


def describe_hqq_layer(stored: Mapping[str, Any], *, name: str, spec_from_dict: SpecFromDict) -> StoredHqqLayer:
    """How a layer is stored, from its settings and from shapes and dtypes. No value of a tensor is read, but one:

    hqq keeps 5 and 6 bits in whole bytes. If ``W_q`` is a tensor, and its codes are what ``nbits`` says, the layer
    gets that width; from a header alone it gets 8 bits.

    Args:
        stored: the layer's entries by their short names: ``W_q``, ``scale`` and ``zero`` as tensors or headers, and
            the settings (``axis``, ``shape``, ...).
        name: the layer's name, for messages.
        spec_from_dict: makes the spec of our layout.

    Raises:
        ValueError: an entry is missing, contradicts another one, or asks for what our layout cannot hold.
    """
    for entry in ("W_q", "shape", "axis", "packing"):
        if entry not in stored:
            raise ValueError(f"{name}: the checkpoint has no {name}.{entry}, which every HQQ layer must have.")
    shape, axis, packing = _shape(stored, name), _integer(stored, "axis", name), _string(stored["packing"])
    if axis not in (0, 1) or packing not in PACKINGS:
        raise ValueError(f"{name}: axis={axis!r}, packing={packing!r} is not a layout that hqq writes.")
    n_weights = math.prod(shape)
    for part in ("scale", "zero"):
        _check_floating(stored[part], f"{name}.{part}")
    n_scales, n_zeros = (math.prod(stored[part].shape) for part in ("scale", "zero"))
    if n_scales == 0 or n_zeros != n_scales or n_weights % n_scales:
        raise ValueError(f"{name}: {n_scales} scales and {n_zeros} zeros do not fit a weight of shape {shape}.")
    group_size = n_weights // n_scales
    n_rows = _code_rows(axis, shape, group_size)
    _check_packed(stored["W_q"], packing, n_rows, n_weights // n_rows, f"{name}.W_q")
    if axis == 0 and shape[0] % group_size:
        raise ValueError(
            f"{name}: with axis=0, group_size={group_size} does not divide out_features={shape[0]}, so that "
            "groups mix input columns. Load it with the hqq package and save it dequantized."
        )
    nbits = _BITS.get(packing, 8)
    if _needs_codes(stored, name) and isinstance(stored["W_q"], Tensor):
        claimed = _integer(stored, "nbits", name)
        nbits = claimed if int(_unpack(stored["W_q"], packing, n_rows).max()) < 2**claimed else 8
    fields = {
        "method": "hqq",
        "nbits": nbits,
        "group_size": _group_size(axis, shape, group_size),
        "axis": axis,
        "scale_dtype": str(stored["scale"].dtype).removeprefix("torch."),
    }
    try:
        spec = spec_from_dict(fields)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return StoredHqqLayer(shape=shape, axis=axis, packing=packing, stored_group_size=group_size, spec=spec)


def _group_size(axis: int, shape: tuple[int, int], stored_group_size: int) -> int:
    """Weights per scale in our layout.

    With ``axis=1`` the common divisor of row and stored group: each part lies in one group, so that repeating the
    group's scale and zero is exact.
    """
    return math.gcd(stored_group_size, shape[1]) if axis == 1 else stored_group_size


def _layer_names(keys: Iterable[str]) -> list[str]:
    """Names of the quantized layers among the keys of a checkpoint, each with all the tensors it needs."""
    keys = set(keys)
    names = sorted(key.removesuffix(".W_q") for key in keys if key.endswith(".W_q"))
    if not names:
        raise ValueError('the checkpoint says quant_method "hqq" but holds no W_q tensor: it is not quantized.')
    missing = [f"{name}.{part}" for name in names for part in _PARTS if f"{name}.{part}" not in keys]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensor(s) of quantized layers, for example {missing[:3]}. Download "
            "or save it again."
        )
    return names


def _needs_codes(stored: Mapping[str, Any], name: str) -> bool:
    """Whether the width of the codes is known only from the codes: 5 or 6 bits, stored in whole bytes."""
    is_in_bytes = "packing" in stored and _string(stored["packing"]) == "8bit_u8"
    return is_in_bytes and "nbits" in stored and _integer(stored, "nbits", name) in (5, 6)


def _code_rows(axis: int, shape: tuple[int, int], group_size: int) -> int:
    """Rows of the matrix of groups: one per group (``axis=1``), or one per place in a group."""
    return math.prod(shape) // group_size if axis == 1 else group_size


def _check_floating(entry: Any, name: str) -> None:
    is_tensor = isinstance(entry, (Tensor, TensorHeader))
    if not (is_tensor and entry.dtype is not None and entry.dtype.is_floating_point):
        raise ValueError(f"{name} must be a floating tensor.")


def _check_packed(W_q: Any, packing: str, n_rows: int, n_columns: int, name: str) -> None:
    """Raise ValueError unless ``W_q``, a tensor or a header, has the shape and dtype of that many packed codes."""
    word, per_word, _ = PACKINGS[packing]
    if not isinstance(W_q, (Tensor, TensorHeader)) or len(W_q.shape) != 2:
        raise ValueError(f"{name} must be a matrix of packed codes.")
    dtype, shape = W_q.dtype, tuple(W_q.shape)
    # ``view_as_float``: words under a floating dtype, for FSDP. torch cannot view a row of odd length as wider words.
    if dtype is not None and dtype.is_floating_point and shape[1] * dtype.itemsize % word.itemsize == 0:
        dtype, shape = word, (shape[0], shape[1] * dtype.itemsize // word.itemsize)
    expected = (-(-n_rows // per_word), n_columns)
    if dtype != word or shape != expected:
        raise ValueError(
            f"{name}: expected {word} of shape {expected} for packing {packing!r}, got "
            f"{W_q.dtype} of shape {tuple(W_q.shape)}."
        )


def _unpack(W_q: Tensor, packing: str, n_rows: int) -> Tensor:
    """Codes (n_rows, n_columns), uint8, of a ``W_q`` that :func:`_check_packed` accepts."""
    word, per_word, nbits = PACKINGS[packing]
    if W_q.dtype != word:
        W_q = W_q.contiguous().view(word)
    mask = (1 << nbits) - 1
    blocks = [(W_q >> (nbits * (per_word - 1 - block))) & mask for block in range(per_word)]
    return torch.cat(blocks)[:n_rows].to(torch.uint8)


def _metadata(stored: Mapping[str, Any], part: str, name: str) -> Tensor:
    """``scale`` or ``zero``, dequantized as the package does it where it quantized them too (before hqq 0.1.8)."""
    tensor, quantized = stored.get(part), stored.get(f"{part}_q")
    stacked = stored.get("zero_scale")  # ``offload_meta``
    if isinstance(stacked, Tensor) and stacked.dim() >= 1 and len(stacked) == 2:
        half = stacked[("zero", "scale").index(part)]
        tensor, quantized = (half, None) if half.is_floating_point() else (None, half)
    if tensor is not None:
        _check_floating(tensor, f"{name}.{part}")
        return tensor
    nested = stored.get(f"meta_{part}")
    if not isinstance(quantized, Tensor) or not isinstance(nested, Mapping):
        raise ValueError(f"{name}: the checkpoint has no {name}.{part}, which every HQQ layer must have.")
    packing = _string(nested.get("packing"))
    if packing not in PACKINGS or quantized.dim() != 2:
        raise ValueError(f"{name}.{part}: packing={packing!r} is not a layout that hqq writes.")
    rows = quantized.shape[0] * PACKINGS[packing][1]
    _check_packed(quantized, packing, rows, quantized.shape[1], f"{name}.{part}")
    codes = _unpack(quantized, packing, rows)
    scale, zero = (_metadata(nested, entry, f"{name}.{part}") for entry in ("scale", "zero"))
    try:  # in the dtype of its own metadata, as the package does it
        return (codes.to(scale.dtype) - zero) * scale
    except RuntimeError:
        raise ValueError(
            f"{name}.{part}: a scale of shape {tuple(scale.shape)} and a zero of shape {tuple(zero.shape)} do not fit "
            f"codes of shape {tuple(codes.shape)}."
        ) from None


def _shape(stored: Mapping[str, Any], name: str) -> tuple[int, int]:
    value = stored["shape"]
    sizes = value.reshape(-1).tolist() if isinstance(value, Tensor) else value
    is_shape = isinstance(sizes, (list, tuple)) and len(sizes) == 2 and all(type(size) is int for size in sizes)
    if not is_shape or min(sizes) < 1 or max(sizes) > 1 << 31:
        raise ValueError(f"{name}: shape={sizes!r} is not a shape of a linear layer.")
    return tuple(sizes)


def _integer(stored: Mapping[str, Any], entry: str, name: str) -> int:
    value = stored[entry]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, (int, float)) or value != value or abs(value) > 1 << 31:
        raise ValueError(f"{name}.{entry} must be a number, got {value!r}.")
    return int(value)


def _string(value: Any) -> str:
    """Text, or the ASCII bytes of it; what is no text at all comes back as some text that nothing matches."""
    if isinstance(value, Tensor) and value.dtype == torch.uint8:
        return bytes(value.reshape(-1).tolist()).decode("ascii", "replace")
    return str(value)
