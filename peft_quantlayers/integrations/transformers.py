"""Registers our quantizer with transformers. The only file that touches private names of transformers.

* ``from_pretrained(float_model, quantization_config=HQQConfig(...))`` quantizes each weight as it is read.
* ``from_pretrained(saved)`` builds the quantized layers first and reads the tensors straight into them.
* ``from_pretrained(published_hqq_model)`` reads the layout of the ``hqq`` package, and converts it.
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantlayers_kernels.bitpack import pack

from ..formats import QuantizedWeight, QuantSpec
from ..formats.checkpoint import QUANT_METHOD, specs_from_json, specs_to_json
from ..formats.spec import METADATA_DTYPES, check_choice
from ..formats.upstream_hqq import SETTING_NAMES, read_hqq_layer
from ..layers import (
    QuantizedLinear,
    dequantize_model,
    quantizable_modules,
    quantize_module,
    quantized_modules,
)
from ..layers.linear import layer_type
from ..layers.replace import linear_shape
from ..quantizers import HQQConfig, HQQSpec, QuantConfig, spec_from_dict
from ..quantizers.config import matches

logger = logging.getLogger(__name__)

_SAFETENSORS_DTYPES = {
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


class QuantlayersConfig(QuantizationConfigMixin):
    """What a quantized model is: the spec of each of its modules. Made by loading and quantizing, not by hand.

    Its JSON form is that of :mod:`peft_quantlayers.formats.checkpoint`, and ``compute_dtype`` where the layers
    compute in another dtype than the model's.
    """

    def __init__(self, specs: dict[str, QuantSpec], compute_dtype: str | None = None) -> None:
        self.quant_method = QUANT_METHOD
        self.specs = specs
        self.compute_dtype = compute_dtype

    @classmethod
    def from_model(cls, model: nn.Module) -> QuantlayersConfig:
        """The config that describes ``model`` as it is now."""
        layers = quantized_modules(model)
        dtypes = {layer.compute_dtype for layer in layers.values()}
        own = dtypes.pop() if len(dtypes) == 1 else None
        pinned = None if own in (None, model.dtype) else str(own).removeprefix("torch.")
        return cls({name: layer.spec for name, layer in layers.items()}, pinned)

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        fields = dict(config_dict)
        compute_dtype = fields.pop("compute_dtype", None)
        if compute_dtype is not None:
            check_choice("quantization_config: compute_dtype", compute_dtype, METADATA_DTYPES)
        config = cls(specs_from_json(fields, spec_from_dict), compute_dtype)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        fields = specs_to_json(self.specs)
        return fields if self.compute_dtype is None else fields | {"compute_dtype": self.compute_dtype}


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


class _QuantizeWeight(ConversionOps):
    """Quantizes one float weight that the loader has read, in place of the module on the meta device."""

    def __init__(self, quantizer: QuantlayersHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict, *, full_layer_name: str, model: nn.Module, missing_keys: set | None = None, **_: Any
    ) -> dict:
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        module_name = full_layer_name.removesuffix(".weight")
        linear = model.get_submodule(module_name)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        try:
            quantize_module(
                model,
                module_name,
                self.quantizer.specs[module_name],
                compute_dtype=self.quantizer.compute_dtype,
            )
        except ValueError as error:
            # transformers would swallow it here and raise a RuntimeError without the reason at the end.
            self.quantizer.failures.append(str(error))
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


class QuantlayersHfQuantizer(HfQuantizer):
    """transformers' view of our models: quantize on the fly, or load what was saved."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.specs: dict[str, QuantSpec] = {}
        self.compute_dtype: str | None = quantization_config.compute_dtype
        self.failures: list[str] = []
        self._model: weakref.ref | None = None

    @classmethod
    def attached_to(cls, model: PreTrainedModel) -> QuantlayersHfQuantizer:
        """A quantizer for a model whose layers were quantized after loading, so that it saves and trains."""
        quantizer = cls(QuantlayersConfig.from_model(model), pre_quantized=True)
        quantizer._attach(model)
        return quantizer

    # ---- before loading

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map sends modules to disk, where quantized layers cannot live. Give them a GPU or the CPU: "
                "they are small."
            )

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module_name, _, tensor_name = param_name.rpartition(".")
        if self.pre_quantized:
            return False
        return tensor_name == "weight" and module_name in self.specs

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeWeight(self)

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        module_name = param_name.rpartition(".")[0]
        if self.param_needs_quantization(model, param_name):
            layout = self.specs[module_name].tensor_layout(*linear_shape(model.get_submodule(module_name)))
            return sum(_nbytes(entry.shape, entry.dtype) for entry in layout.values()) / param.numel()
        if hasattr(param, "n_weights"):  # codes, whose numel() counts weights
            return param.nelement() * param.element_size() / max(1, param.numel())
        return param.element_size()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Tensors of quantized layers keep the dtype of the file: a wrong one must be found, not cast away."""
        name = converter.target_patterns[0] if getattr(converter, "target_patterns", None) else ""
        module_name, _, tensor_name = name.rpartition(".")
        if module_name in self.specs and tensor_name != "bias":
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            self.specs = quantizable_modules(model, self.quantization_config)
            return
        self.specs = _rename_to_model(self.quantization_config.specs, model)
        _check_headers(checkpoint_files or [], self.specs, model)
        self._place_empty_layers(model)

    def _place_empty_layers(self, model: PreTrainedModel) -> None:
        for name, spec in self.specs.items():
            linear = model.get_submodule(name)
            out_features, in_features = linear_shape(linear)
            dtype = getattr(torch, self.compute_dtype) if self.compute_dtype else linear.weight.dtype
            layer = QuantizedLinear.empty(
                spec,
                out_features=out_features,
                in_features=in_features,
                bias=linear.bias is not None,
                compute_dtype=dtype,
                device="meta",
                layer_name=name,
            )
            if layer.bias is not None:
                layer.bias = nn.Parameter(torch.empty_like(linear.bias, device="meta"))
            model.set_submodule(name, layer)

    # ---- after loading

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.failures:
            raise ValueError("\n".join(self.failures))
        for name, layer in quantized_modules(model).items():
            if self.pre_quantized:
                _check_loaded(name, layer)
            for parameter_name, parameter in layer.named_parameters(recurse=False):
                if parameter_name != "bias":
                    parameter.requires_grad = False  # the loader makes floats trainable
        self.quantization_config = QuantlayersConfig.from_model(model)
        self._attach(model)

    def _attach(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self.pre_quantized = True
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = QUANT_METHOD
        model.hqq_quantized = True  # PEFT's prepare_model_for_kbit_training asks for it
        model.config.quantization_config = self.quantization_config
        model.config._is_quantized = True

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        super().remove_quantization_config(model)
        if hasattr(model, "hqq_quantized"):
            del model.hqq_quantized
        model.config._is_quantized = False

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return dequantize_model(model, dtype)

    # ---- what transformers asks a loaded model

    def is_serializable(self) -> bool:
        """True. transformers asks right before it saves: the config is brought up to date with the layers."""
        model = self._model() if self._model is not None else None
        if model is not None:
            self.quantization_config = QuantlayersConfig.from_model(model)
            model.config.quantization_config = self.quantization_config
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def __deepcopy__(self, memo: dict) -> QuantlayersHfQuantizer:
        copied = type(self)(self.quantization_config, pre_quantized=self.pre_quantized)
        copied.specs, copied._model = dict(self.specs), None
        return copied

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_model": None}


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
        stored = _upstream_names(set(_header_keys(checkpoint_files or [])))
        # The real spec of each layer is beside its tensors; this one only reserves the names.
        self.specs = _rename_to_model(dict.fromkeys(stored, HQQSpec(group_size=None)), model)
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


# ---- checkpoint files, read without loading a tensor


def _header_keys(files: Iterable[str]) -> Iterable[str]:
    for file in files:
        with _open(file) as opened:
            yield from opened.keys()


def _open(file: str) -> Any:
    if not str(file).endswith(".safetensors"):
        raise ValueError(
            f"{Path(file).name}: quantized models are read from safetensors files only, since a pickle may run code. "
            "For a folder that the hqq package wrote (qmodel.pt) use peft_quantlayers.load_hqq_folder."
        )
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{Path(file).name} is damaged or incomplete ({error}). Download or save it again.") from None


def _check_headers(files: Iterable[str], specs: dict[str, QuantSpec], model: nn.Module) -> None:
    """Compare names, shapes and dtypes in the files with what the specs ask for, before anything is loaded."""
    layouts = {name: spec.tensor_layout(*linear_shape(model.get_submodule(name))) for name, spec in specs.items()}
    found: dict[str, set[str]] = {name: set() for name in specs}
    is_seen = False
    for file in files:
        with _open(file) as opened:
            for key in opened.keys():  # noqa: SIM118
                stored_name, _, tensor_name = key.rpartition(".")
                name = _model_name(stored_name, specs, model)
                if name is None:
                    continue
                is_seen = True
                if tensor_name == "bias":
                    continue
                expected = layouts[name].get(tensor_name)
                if expected is None:
                    raise ValueError(
                        f"{Path(file).name}: unexpected tensor {key!r}; a layer stored as {specs[name]} has "
                        f"{sorted(layouts[name])}. The file does not belong to this config.json."
                    )
                entry = opened.get_slice(key)
                shape, dtype = tuple(entry.get_shape()), _SAFETENSORS_DTYPES.get(entry.get_dtype())
                if shape != expected.shape or dtype != expected.dtype:
                    raise ValueError(
                        f"{Path(file).name}: {key!r} is {entry.get_dtype()} of shape {shape}, and config.json asks "
                        f"for {expected.dtype} of shape {expected.shape}. The file does not belong to this "
                        "config.json, or is damaged."
                    )
                found[name].add(tensor_name)
    if not is_seen:
        return  # names are converted while loading; the loaded tensors are checked instead
    missing = [f"{name}.{tensor}" for name in specs for tensor in layouts[name] if tensor not in found[name]]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensor(s) that its config.json promises, for example "
            f"{missing[:3]}. Download or save it again."
        )


def _read_settings(files: Iterable[str], model: nn.Module, specs: dict[str, QuantSpec]) -> dict[str, dict[str, Any]]:
    settings: dict[str, dict[str, Any]] = {name: {} for name in specs}
    for file in files:
        with _open(file) as opened:
            for key in opened.keys():  # noqa: SIM118
                stored_name, _, entry = key.rpartition(".")
                if entry in SETTING_NAMES:
                    name = _model_name(stored_name, specs, model)
                    if name is not None:
                        settings[name][entry] = opened.get_tensor(key)
    return settings


def _check_loaded(name: str, layer: QuantizedLinear) -> None:
    for tensor_name, parameter in layer.named_parameters(recurse=False):
        if not getattr(parameter, "_is_hf_initialized", False):
            raise ValueError(f"the checkpoint lacks the tensor {name}.{tensor_name}. Download or save it again.")
    if layer.codes.device.type != "meta":
        layer.quantized_weight.check(name)


def _model_name(stored_name: str, names: Any, model: nn.Module) -> str | None:
    """The module that a name in a file means: the base model's prefix may be there or not."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    for candidate in (stored_name, stored_name.removeprefix(prefix), prefix + stored_name):
        if candidate in names:
            return candidate
    return None


def _rename_to_model(specs: dict[str, QuantSpec], model: nn.Module) -> dict[str, QuantSpec]:
    """``specs`` by the module names of ``model``.

    Raises:
        ValueError: a module is not in the model, is no linear layer, or its shape does not fit its spec.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    is_headless = getattr(model, "base_model", model) is model
    renamed = {}
    for stored_name, spec in specs.items():
        name = _model_name(stored_name, linears, model)
        if name is None:
            if is_headless:  # AutoModel on a checkpoint with a head: the head is not in this model
                continue
            raise ValueError(
                f"config.json names a quantized module {stored_name!r}, and the model has no linear layer of that "
                "name. The config does not belong to this model."
            )
        try:
            spec.tensor_layout(*linear_shape(linears[name]))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        renamed[name] = spec
    if not renamed:
        raise ValueError("config.json names quantized modules, and the model has none of them.")
    return renamed


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


# ---- registration

_taken_over: dict[str, tuple[Any, Any]] = {}


def register() -> None:
    """Make transformers use our quantizers for "quantlayers" and "hqq". Does nothing when it is done already."""
    if _taken_over:
        return
    for name, config, quantizer in (
        (QUANT_METHOD, QuantlayersConfig, QuantlayersHfQuantizer),
        ("hqq", UpstreamHqqConfig, UpstreamHqqHfQuantizer),
    ):
        _taken_over[name] = (AUTO_QUANTIZATION_CONFIG_MAPPING.get(name), AUTO_QUANTIZER_MAPPING.get(name))
        AUTO_QUANTIZATION_CONFIG_MAPPING[name] = config
        AUTO_QUANTIZER_MAPPING[name] = quantizer


def unregister() -> None:
    """Put transformers' own quantizers back."""
    for name, (config, quantizer) in _taken_over.items():
        for mapping, original in ((AUTO_QUANTIZATION_CONFIG_MAPPING, config), (AUTO_QUANTIZER_MAPPING, quantizer)):
            if original is None:
                mapping.pop(name, None)
            else:
                mapping[name] = original
    _taken_over.clear()
