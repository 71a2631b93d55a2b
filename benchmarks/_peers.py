"""The ``hqq`` package as a peer: the same weight, the same settings."""

from dataclasses import dataclass

import torch
from hqq.core.quantize import BaseQuantizeConfig, Quantizer
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PeerWeight:
    """What ``hqq`` makes of a weight (out_features, in_features).

    Fields:
        codes: (out_features, in_features), uint8.
        dense: the dequantized weight, float32.
        bits_per_weight: codes and metadata as its checkpoints hold them, scale and zero in float16.
    """

    codes: Tensor
    dense: Tensor
    bits_per_weight: float


def quantize_with_hqq(
    weight: Tensor, *, nbits: int, group_size: int, axis: int, round_zero: bool | None = None, device: str = "cpu"
) -> tuple[Tensor, dict]:
    """``hqq``'s packed codes and metadata of ``weight``, solved as its ``HQQLinear`` does; the call that is timed.

    ``round_zero``: start from a rounded zero; None for the package's own choice, which is to do so at 4 bits.
    """
    settings = BaseQuantizeConfig(nbits=nbits, group_size=group_size, axis=axis)["weight_quant_params"]
    if round_zero is not None:
        settings["round_zero"] = round_zero
    W_q, meta = Quantizer.quantize(weight, device=device, compute_dtype=torch.float32, **settings)
    return W_q, meta | {"compute_dtype": torch.float32}


def peer_weight(W_q: Tensor, meta: dict) -> PeerWeight:
    """The value behind what :func:`quantize_with_hqq` returned."""
    codes = Quantizer.unpack[meta["packing"]](W_q)
    n_rows = meta["scale"].shape[0] if meta["axis"] == 1 else meta["group_size"]
    nbytes = W_q.nbytes + 2 * (meta["scale"].numel() + meta["zero"].numel())
    return PeerWeight(
        codes=codes[:n_rows].reshape(meta["shape"]).clone(),
        dense=Quantizer.dequantize(W_q, meta).clone(),
        bits_per_weight=8 * nbytes / meta["shape"].numel(),
    )
