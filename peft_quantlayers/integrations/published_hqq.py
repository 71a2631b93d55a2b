"""transformers' quantizer for quant_method "hqq": published checkpoints, and transformers' own ``HqqConfig``."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..layers.dense_types import dense_modules
from ..methods import QuantConfig
from ..methods.config import matches
from .given_configs import hqq_config
from .transformers_quantizer import QuantlayersHfQuantizer


class PublishedHqqHfQuantizer(QuantlayersHfQuantizer):
    """Loads checkpoints of quant_method "hqq" as transformers 4 and the hqq package wrote them.

    Given a float model and transformers' own ``HqqConfig``, quantizes with the settings that it names.
    """

    def __init__(self, quantization_config: Any, pre_quantized: bool = True, **kwargs: Any) -> None:
        if not pre_quantized:
            quantization_config = hqq_config(quantization_config.to_dict())
        super().__init__(quantization_config, pre_quantized=pre_quantized, **kwargs)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            self.quantization_config = _without_untagged(self.quantization_config, model)
        super()._process_model_before_weight_loading(model, checkpoint_files, **kwargs)


def _without_untagged(config: QuantConfig, model: nn.Module) -> QuantConfig:
    """``config`` with the layers that no tag of a ``dynamic_config`` means skipped: those stay float in ``hqq``."""
    if not config.overrides:
        return config
    untagged = [name for name in dense_modules(model) if not any(matches(name, tag) for tag in config.overrides)]
    return dataclasses.replace(config, skip_modules=(*(config.skip_modules or ()), *untagged))
