"""What ``save_pretrained`` would write of a quantized model of which only a part is in memory at a time."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..formats import QuantSpec
from ..layers.embedding_tables import place_empty_tables
from ..layers.quantized_layers import quantized_layers
from ..layers.replace import place_empty_layer
from .float_checkpoint import FloatCheckpoint
from .sentinels import sentinels
from .tensor_conversion import keep_from_conversions
from .transformers_config import QuantlayersConfig, describe_model
from .wide_codes import state_with_wide_codes


class WrittenTensors:
    """The tensors of the files, by the names and in the order of ``save_pretrained``.

    Args:
        checkpoint: the float model.
        specs: of the layers that are quantized, and of one table of those that share their rows.
    """

    def __init__(self, checkpoint: FloatCheckpoint, specs: Mapping[str, QuantSpec]) -> None:
        self._ignored = set(checkpoint.model._keys_to_ignore_on_save or ())
        # A model with all layers in their places knows all names; the other one is dense where nothing was read yet.
        self._skeleton = checkpoint.new_model()
        self._skeleton.all_tied_weights_keys = dict(checkpoint.tied)
        tables = place_empty_tables(self._skeleton, specs, compute_dtypes={}, device="meta")
        for name, spec in specs.items():
            if name not in tables:
                place_empty_layer(self._skeleton, name, spec, compute_dtype=None, device="meta")
        self._skeleton._weight_conversions = list(checkpoint.conversions)
        self._tied = dict(self._skeleton.all_tied_weights_keys)
        for target, source in self._tied.items():
            parent, _, name = target.rpartition(".")
            setattr(self._skeleton.get_submodule(parent), name, self._skeleton.get_parameter(source))
        state = self._state(self._skeleton)
        keep_from_conversions(self._skeleton, state)
        self._kept = set(remove_tied_weights_from_state_dict(dict(state), self._skeleton))

    def names(self, *, has_sentinels: bool) -> list[str]:
        """Names of all tensors in the files, in their order."""
        state = {name: tensor for name, tensor in self._state(self._skeleton).items() if name in self._kept}
        if has_sentinels:
            state |= {name: tensor.to("meta") for name, tensor in sentinels(self._skeleton).items()}
        return list(revert_weight_conversion(self._skeleton, state))

    def of_parameters(
        self, model: PreTrainedModel, parameters: Collection[str]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors of the files that are made of ``parameters`` of the float model, without sentinels.

        Returns:
            The tensors by their names in the files; and the name in the file for each in the state of ``model`` that
            is the same tensor there.
        """
        layers = {name for name in quantized_layers(model) if {name, f"{name}.weight"} & set(parameters)}
        state = {}
        for name, tensor in self._state(model).items():
            module, _, tensor_name = name.rpartition(".")
            is_of_layer = module in layers and tensor_name != "bias"
            if (name in parameters or is_of_layer) and self._tied.get(name, name) in self._kept:
                state[self._tied.get(name, name)] = tensor
        written = revert_weight_conversion(self._skeleton, dict(state))
        places = {(tensor.data_ptr(), tensor.dtype, tensor.shape): key for key, tensor in written.items()}
        same = {name: places.get((tensor.data_ptr(), tensor.dtype, tensor.shape)) for name, tensor in state.items()}
        return written, {name: key for name, key in same.items() if key is not None}

    def sentinels(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The sentinels of all quantized layers of ``model``."""
        return revert_weight_conversion(self._skeleton, dict(sentinels(model)))

    def _state(self, model: PreTrainedModel) -> dict[str, Any]:
        state: dict[str, Any] = state_with_wide_codes(model, model.state_dict())
        return {name: tensor for name, tensor in state.items() if name not in self._ignored}


def quantized_config(model: PreTrainedModel, layers: Mapping[str, Mapping[str, Any]]) -> QuantlayersConfig:
    """The quantization config of ``model``, whose layers are on the meta device.

    ``layers``: of each whether the model's dtype cannot hold its scales (``is_lossy``), known when it was made.
    """
    lossy = tuple(name for name, about in layers.items() if about["is_lossy"])
    return QuantlayersConfig.of(replace(describe_model(model), lossy_in_model_dtype=lossy))


def config_text(model: PreTrainedModel, quantization_config: QuantlayersConfig) -> str:
    """The config.json that ``save_pretrained`` would write of ``model`` with this quantization config."""
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.quantization_config = quantization_config
    return config.to_json_string(use_diff=True)
