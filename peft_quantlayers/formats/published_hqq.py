"""Reads HQQ layers as the ``hqq`` package and transformers 4 wrote them. Nothing from the file is executed.

Layout (hqq 0.2, ``Quantizer`` and ``BitPack``): the weight is reshaped to groups, (n_groups, group_size) for
``axis=1`` and (group_size, n_groups) for ``axis=0``, and packed along its rows: with ``R`` rows and ``f`` codes a
word, row ``i`` lies in packed row ``i % (R / f)``, the first block in the highest bits. ``scale`` and ``zero``
have one entry a group. Beside the tensors each layer carries its own settings, as values (hqq's ``qmodel.pt``)
or as small tensors (safetensors): integers as they are, strings and dtypes as ASCII bytes.

Older releases also kept all but ``W_q`` under one key ``meta``, quantized scale and zero in turn (``scale_q`` with
its own ``meta_scale``, ``zero_q`` likewise), or stacked the two as ``zero_scale``; those are read as well.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# packing name: (dtype of a word, codes a word, bits between two codes of a word)
_PACKINGS = {
    "8bit_u8": (torch.uint8, 1, 8),
    "4bit_u8": (torch.uint8, 2, 4),
    "3bit_32": (torch.int32, 10, 3),
    "2bit_u8": (torch.uint8, 4, 2),
    "1bit_u8": (torch.uint8, 8, 1),
}
_BITS = {"4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2, "1bit_u8": 1}

# Everything that a layer may carry beside its tensors; the loader need not report these as unexpected.
SETTING_NAMES = (
    "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale",
    "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
    "optimize", "round_zero",
)  # fmt: skip


def read_hqq_layer(stored: Mapping[str, Any], *, name: str) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
    """Spec fields, codes, scale and zero of one stored layer.

    Args:
        stored: the layer's entries by their short names (``W_q``, ``scale``, ``axis``, ...).
        name: the layer's name, for messages.

    Returns:
        Fields for an ``HQQSpec`` (nbits, group_size, axis, scale_dtype); codes (out_features, in_features) uint8;
        scale and zero in our shapes, dtypes as stored. A group that runs over the end of a row (which ``hqq``
        allows) is split into smaller groups with the same scale and zero.

    Raises:
        ValueError: an entry is missing, contradicts another one, or asks for what our layout cannot hold.
    """
    if isinstance(stored.get("meta"), Mapping):
        stored = {**stored["meta"], **stored}
    for entry in ("W_q", "shape", "axis", "packing"):
        if entry not in stored:
            raise ValueError(f"{name}: the checkpoint has no {name}.{entry}, which every HQQ layer must have.")
    shape, axis, packing = _shape(stored, name), _integer(stored, "axis", name), _string(stored["packing"])
    if axis not in (0, 1) or packing not in _PACKINGS:
        raise ValueError(f"{name}: axis={axis!r}, packing={packing!r} is not a layout that hqq writes.")
    out_features, in_features = shape
    scale, zero = (_metadata(stored, part, name) for part in ("scale", "zero"))
    for part, metadata in (("scale", scale), ("zero", zero)):
        if metadata.device.type != "meta" and not torch.isfinite(metadata).all():
            raise ValueError(f"{name}.{part} holds NaN or Inf: the checkpoint is damaged.")
    n_groups = scale.numel()
    if n_groups == 0 or zero.numel() != n_groups or (out_features * in_features) % n_groups:
        raise ValueError(
            f"{name}: {scale.numel()} scales and {zero.numel()} zeros do not fit a weight of shape {shape}."
        )
    group_size = out_features * in_features // n_groups
    n_rows = n_groups if axis == 1 else group_size
    codes = _unpack(stored["W_q"], packing, n_rows, out_features * in_features // n_rows, name)
    codes = codes.reshape(out_features, in_features)

    if axis == 1:
        # One group per common divisor of row and group: exact, since each part lies in one group.
        divisor = math.gcd(group_size, in_features)
        scale, zero = (
            metadata.reshape(-1).repeat_interleave(group_size // divisor).reshape(out_features, -1)
            for metadata in (scale, zero)
        )
        group_size = divisor
    elif out_features % group_size:
        raise ValueError(
            f"{name}: with axis=0, group_size={group_size} does not divide out_features={out_features}, so that "
            "groups mix input columns. Load it with the hqq package and save it dequantized."
        )
    else:
        scale, zero = (metadata.reshape(out_features // group_size, in_features) for metadata in (scale, zero))
    nbits = _BITS.get(packing) or _stored_bits(stored, codes, name)
    fields = {
        "nbits": nbits,
        "group_size": group_size,
        "axis": axis,
        "scale_dtype": str(scale.dtype).removeprefix("torch."),
    }
    return fields, codes, scale.contiguous(), zero.contiguous()


def _stored_bits(stored: Mapping[str, Any], codes: Tensor, name: str) -> int:
    """hqq keeps 5 and 6 bits in whole bytes; ours are packed, if the codes are what ``nbits`` says."""
    nbits = _integer(stored, "nbits", name) if "nbits" in stored else 8
    return nbits if nbits in (5, 6) and int(codes.max()) < 2**nbits else 8


def _unpack(W_q: Any, packing: str, n_rows: int, n_columns: int, name: str) -> Tensor:
    word, per_word, nbits = _PACKINGS[packing]
    if not isinstance(W_q, Tensor) or W_q.dim() != 2:
        raise ValueError(f"{name}.W_q must be a matrix of packed codes.")
    stored_dtype, stored_shape = W_q.dtype, tuple(W_q.shape)
    # ``view_as_float``: words under a floating dtype, for FSDP. torch cannot view a row of odd length as wider words.
    is_viewed = W_q.is_floating_point() and stored_shape[1] * W_q.element_size() % word.itemsize == 0
    if is_viewed:
        W_q = W_q.contiguous().view(word)
    packed_rows = -(-n_rows // per_word)
    if W_q.dtype != word or tuple(W_q.shape) != (packed_rows, n_columns):
        raise ValueError(
            f"{name}.W_q: expected {word} of shape {(packed_rows, n_columns)} for packing {packing!r}, got "
            f"{stored_dtype} of shape {stored_shape}."
        )
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
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{name}.{part} must be a floating tensor.")
        return tensor
    nested = stored.get(f"meta_{part}")
    if not isinstance(quantized, Tensor) or not isinstance(nested, Mapping):
        raise ValueError(f"{name}: the checkpoint has no {name}.{part}, which every HQQ layer must have.")
    packing = _string(nested.get("packing"))
    if packing not in _PACKINGS or quantized.dim() != 2:
        raise ValueError(f"{name}.{part}: packing={packing!r} is not a layout that hqq writes.")
    rows = quantized.shape[0] * _PACKINGS[packing][1]
    codes = _unpack(quantized, packing, rows, quantized.shape[1], f"{name}.{part}")
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
        raise ValueError(f"{name}: shape={sizes!r} is no shape of a linear layer.")
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
