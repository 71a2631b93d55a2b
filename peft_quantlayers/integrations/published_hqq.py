"""transformers' quantizer for quant_method "hqq": published checkpoints, and transformers' own ``HqqConfig``."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..layers.dense_types import dense_modules
from ..methods import HQQConfig, QuantConfig
from ..methods.config import matches
from .transformers_quantizer import QuantlayersHfQuantizer


class PublishedHqqHfQuantizer(QuantlayersHfQuantizer):
    """Loads checkpoints of quant_method "hqq" as transformers 4 and the hqq package wrote them.

    Given a float model and transformers' own ``HqqConfig``, quantizes with the settings that it names.
    """

    def __init__(self, quantization_config: Any, pre_quantized: bool = True, **kwargs: Any) -> None:
        if not pre_quantized:
            quantization_config = _from_transformers_config(quantization_config)
        super().__init__(quantization_config, pre_quantized=pre_quantized, **kwargs)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            self.quantization_config = _without_untagged(self.quantization_config, model)
        super()._process_model_before_weight_loading(model, checkpoint_files, **kwargs)


def _from_transformers_config(config: Any) -> QuantConfig:
    """Our config for transformers' ``HqqConfig``, which holds either one setting or one for each layer tag."""
    settings = config.quant_config or {}
    skip = tuple(name for name in config.skip_modules or () if name != "lm_head") or None
    if "weight_quant_params" in settings:
        return HQQConfig(skip_modules=skip, **_hqq_fields(settings))
    overrides = {tag: _hqq_fields(tagged) for tag, tagged in settings.items()}
    return HQQConfig(skip_modules=skip, overrides=overrides or None)


def _without_untagged(config: QuantConfig, model: nn.Module) -> QuantConfig:
    """``config`` with the layers that no tag of a ``dynamic_config`` means skipped: those stay float in ``hqq``."""
    if not config.overrides:
        return config
    untagged = [name for name in dense_modules(model) if not any(matches(name, tag) for tag in config.overrides)]
    return dataclasses.replace(config, skip_modules=(*(config.skip_modules or ()), *untagged))


def _hqq_fields(settings: dict[str, Any]) -> dict[str, Any]:
    wanted = settings.get("weight_quant_params", settings)
    return {name: wanted[name] for name in ("nbits", "group_size", "axis") if name in wanted}
