"""Loads published HQQ checkpoints through transformers: the layout of transformers 4 and of the ``hqq`` package."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantlayers_kernels.bitpack import pack

from ..formats import QuantizedWeight, QuantSpec
from ..formats.published_hqq import SETTING_NAMES, read_hqq_layer
from ..layers import QuantizedLinear
from ..layers.linear import layer_type
from ..methods import HQQConfig, HQQSpec, QuantConfig
from ..methods.config import matches
from .checkpoint_headers import header_dtypes, model_name, open_checkpoint, rename_to_model
from .transformers_quantizer import QuantlayersHfQuantizer


class UpstreamHqqConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a published HQQ checkpoint; each layer's own settings lie beside its tensors."""

    def __init__(self, quant_config: Any = None, skip_modules: Any = None, **_: Any) -> None:
        self.quant_method = "hqq"
        self.quant_config = quant_config
        self.skip_modules = skip_modules

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config


class UpstreamHqqHfQuantizer(QuantlayersHfQuantizer):
    """Loads checkpoints of quant_method "hqq" as transformers 4 and the hqq package wrote them.

    Given a float model and transformers' own ``HqqConfig``, quantizes with the settings that it names.
    """

    def __init__(self, quantization_config: Any, pre_quantized: bool = True, **kwargs: Any) -> None:
        if not pre_quantized:
            quantization_config = _from_transformers_config(quantization_config)
        else:
            quantization_config.compute_dtype = None
        super().__init__(quantization_config, pre_quantized=pre_quantized, **kwargs)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            self.quantization_config = _without_untagged(self.quantization_config, model)
            return super()._process_model_before_weight_loading(model, checkpoint_files, **kwargs)
        stored = _upstream_names(set(header_dtypes(checkpoint_files or [])))
        # The real spec of each layer is beside its tensors; this one only reserves the names.
        self.specs = rename_to_model(dict.fromkeys(stored, HQQSpec(group_size=None)), model)
        self._place_empty_layers(model)
        settings = {rf"\.{name}$" for name in SETTING_NAMES}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | settings
        self._settings = _read_settings(checkpoint_files or [], model, self.specs)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """True also for codes in the upstream layout, so that the loader lets their other shape pass."""
        if not self.pre_quantized:
            return super().param_needs_quantization(model, param_name, **kwargs)
        module_name, _, tensor_name = param_name.rpartition(".")
        return module_name in self.specs and tensor_name != "bias"

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        return 1.0 if self.pre_quantized else super().param_element_size(model, param_name, param)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.pre_quantized:
            for name in self.specs:
                layer = model.get_submodule(name)
                stored = self._settings[name] | {
                    tensor: layer._parameters[tensor].data for tensor in ("W_q", "scale", "zero")
                }
                model.set_submodule(name, linear_from_upstream(stored, layer, name=name, dtype=layer.compute_dtype))
        super()._process_model_after_weight_loading(model, **kwargs)


def linear_from_upstream(
    stored: Mapping[str, Any], linear: nn.Linear, *, name: str, dtype: torch.dtype
) -> QuantizedLinear:
    """The quantized layer that the ``hqq`` package stored as ``stored``, with the bias of ``linear``, its place.

    Raises:
        ValueError: as :func:`read_hqq_layer`, or the weight does not have the shape of ``linear``.
    """
    fields, codes, scale, zero = read_hqq_layer(stored, name=name)
    if tuple(codes.shape) != (linear.out_features, linear.in_features):
        raise ValueError(
            f"{name}: the checkpoint holds a weight of shape {tuple(codes.shape)}, the model wants "
            f"{(linear.out_features, linear.in_features)}."
        )
    try:
        spec = HQQSpec(**fields)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    quantized = QuantizedWeight(
        spec=spec,
        out_features=linear.out_features,
        in_features=linear.in_features,
        tensors={"W_q": pack(codes, spec.nbits), "scale": scale, "zero": zero},
    )
    quantized.check(name)
    converted = layer_type(spec.method)(quantized, linear.bias, compute_dtype=dtype, layer_name=name)
    for parameter in converted.parameters():
        parameter._is_hf_initialized = True
    return converted.train(linear.training)


def _upstream_names(keys: set[str]) -> list[str]:
    """Names of the quantized layers among the keys of a checkpoint, each with all the tensors it needs."""
    names = sorted(key.removesuffix(".W_q") for key in keys if key.endswith(".W_q"))
    if not names:
        raise ValueError('the checkpoint says quant_method "hqq" but holds no W_q tensor: it is not quantized.')
    missing = [f"{name}.{part}" for name in names for part in ("scale", "zero") if f"{name}.{part}" not in keys]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensor(s) of quantized layers, for example {missing[:3]}. Download "
            "or save it again."
        )
    return names


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
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    untagged = [name for name in linears if not any(matches(name, tag) for tag in config.overrides)]
    return dataclasses.replace(config, skip_modules=(*(config.skip_modules or ()), *untagged))


def _hqq_fields(settings: dict[str, Any]) -> dict[str, Any]:
    wanted = settings.get("weight_quant_params", settings)
    return {name: wanted[name] for name in ("nbits", "group_size", "axis") if name in wanted}


def _read_settings(files: Iterable[str], model: nn.Module, specs: dict[str, QuantSpec]) -> dict[str, dict[str, Any]]:
    settings: dict[str, dict[str, Any]] = {name: {} for name in specs}
    for file in files:
        with open_checkpoint(file) as opened:
            for key in opened.keys():  # noqa: SIM118
                stored_name, _, entry = key.rpartition(".")
                if entry in SETTING_NAMES:
                    name = model_name(stored_name, specs, model)
                    if name is not None:
                        settings[name][entry] = opened.get_tensor(key)
    return settings
