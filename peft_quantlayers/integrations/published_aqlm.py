"""Loads published AQLM checkpoints through transformers, into our own layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..formats.published_aqlm import SCHEME, read_aqlm_scheme
from ..methods import AQLMSpec
from .checkpoint_headers import header_dtypes
from .transformers_quantizer import QuantlayersHfQuantizer


class UpstreamAqlmConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a published AQLM checkpoint.

    ``linear_weights_not_to_quantize`` is not needed: what is quantized is what the file holds codes for. (Published
    lists say ``lm_head.weight`` where transformers 5 compares with ``lm_head``, and so quantizes a head that has no
    codes.)
    """

    def __init__(self, **fields: Any) -> None:
        self.quant_method = "aqlm"
        self.compute_dtype = None
        self.scheme = read_aqlm_scheme(fields)

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config


class UpstreamAqlmHfQuantizer(QuantlayersHfQuantizer):
    """Loads checkpoints of quant_method "aqlm", published ones and our own."""

    def __init__(self, quantization_config: Any, pre_quantized: bool = True, **kwargs: Any) -> None:
        if not pre_quantized:
            raise ValueError(
                "transformers' AqlmConfig cannot quantize a model. Use peft_quantlayers.AQLMConfig("
                + ", ".join(f"{name}={getattr(quantization_config, name, '...')}" for name in SCHEME)
                + ")."
            )
        super().__init__(quantization_config, pre_quantized=True, **kwargs)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        dtypes = header_dtypes(checkpoint_files or [])
        names = _layer_names(dtypes)
        _refuse_experts(names)
        scheme = self.quantization_config.scheme
        self.quantization_config.specs = {
            name: AQLMSpec(**scheme, scale_dtype=str(dtypes.get(f"{name}.codebooks")).removeprefix("torch."))
            for name in names
        }
        super()._process_model_before_weight_loading(model, checkpoint_files, **kwargs)


def _layer_names(keys: Iterable[str]) -> list[str]:
    """Names of the layers that a checkpoint holds any AQLM tensor of; ValueError where one lacks another."""
    parts = ("codes", "codebooks", "scales")
    stored = [key.rpartition(".") for key in keys]
    found = {(name, part) for name, _, part in stored if part in parts}
    if not any(part == "codes" for _, part in found):
        raise ValueError('the checkpoint says quant_method "aqlm" but holds no codes: it is not quantized.')
    names = sorted({name for name, _ in found})
    missing = [f"{name}.{part}" for name in names for part in parts if (name, part) not in found]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensor(s) of quantized layers, for example {missing[:3]}. Download "
            "or save it again."
        )
    return names


def _refuse_experts(names: Iterable[str]) -> None:
    for name in names:
        if ".experts." in name:
            raise ValueError(
                f"{name}: transformers 5 keeps the experts of a layer in one tensor, for which the codes of single "
                "experts cannot stand. AQLM mixture-of-experts checkpoints need transformers 4."
            )
