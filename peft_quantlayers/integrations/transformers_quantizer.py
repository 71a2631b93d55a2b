"""Our quantizer, as transformers sees it. Registered by ``transformers.py`` beside this file.

* ``from_pretrained(float_model, quantization_config=HQQConfig(...))`` quantizes each weight as it is read.
* ``from_pretrained(saved)`` builds the quantized layers first and reads the tensors straight into them.
* Published checkpoints of other layouts are read by the subclasses in ``hqq.py`` and ``aqlm.py``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..formats import QuantSpec
from ..formats.checkpoint import QUANT_METHOD, branches_from_json, specs_from_json, specs_to_json
from ..formats.published_aqlm import aqlm_config
from ..formats.spec import METADATA_DTYPES, check_choice
from ..layers import (
    LowRankBranch,
    QuantizedLinear,
    dequantize_model,
    quantizable_modules,
    quantize_module,
    quantized_modules,
)
from ..layers.dense_types import dense_shape
from ..layers.replace import place_empty_layer
from ..methods import spec_from_dict
from ..methods.aqlm.method import MAX_SCALE_ERROR
from .checkpoint_headers import check_headers, model_name, rename_to_model


class QuantlayersConfig(QuantizationConfigMixin):
    """What a quantized model is: the spec of each of its modules. Made by loading and quantizing, not by hand.

    Its JSON form is that of :mod:`peft_quantlayers.formats.checkpoint`, with ``compute_dtype`` where the layers
    compute in another dtype than the model's. A model of AQLM layers of one scheme is written in the published form
    instead, which the ``aqlm`` package reads, unless that package would lose scales (``is_for_stock_aqlm``).
    """

    def __init__(
        self,
        specs: dict[str, QuantSpec],
        compute_dtype: str | None = None,
        dense_linears: tuple[str, ...] = (),
        branches: dict[str, int] | None = None,
        is_for_stock_aqlm: bool = True,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.specs = specs
        self.compute_dtype = compute_dtype
        self.dense_linears = dense_linears
        self.branches = branches or {}
        self.is_for_stock_aqlm = is_for_stock_aqlm

    @classmethod
    def from_model(cls, model: nn.Module) -> QuantlayersConfig:
        """The config that describes ``model`` as it is now."""
        layers = quantized_modules(model)
        dtypes = {layer.compute_dtype for layer in layers.values()}
        own = dtypes.pop() if len(dtypes) == 1 else None
        pinned = None if own in (None, model.dtype) else str(own).removeprefix("torch.")
        dense = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not isinstance(module, QuantizedLinear)
        ]
        branches = {name: layer.branch.rank for name, layer in layers.items() if layer.branch is not None}
        return cls(
            {name: layer.spec for name, layer in layers.items()},
            pinned,
            tuple(dense),
            branches,
            all(_fits_in(model.dtype, layer) for layer in layers.values()),
        )

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        fields = dict(config_dict)
        compute_dtype = fields.pop("compute_dtype", None)
        if compute_dtype is not None:
            check_choice("quantization_config: compute_dtype", compute_dtype, METADATA_DTYPES)
        config = cls(specs_from_json(fields, spec_from_dict), compute_dtype, branches=branches_from_json(fields))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        if (
            self.compute_dtype is None
            and self.is_for_stock_aqlm
            and not self.branches
            and (published := aqlm_config(self.specs.values(), self.dense_linears))
        ):
            return published
        fields = specs_to_json(self.specs, self.branches)
        return fields if self.compute_dtype is None else fields | {"compute_dtype": self.compute_dtype}


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
    # Set while a PVTuner trains the layers themselves: the Trainer then takes the model without an adapter.
    is_training_codes = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.specs: dict[str, QuantSpec] = {}
        self.compute_dtype: str | None = quantization_config.compute_dtype
        self.branches: dict[str, int] = getattr(quantization_config, "branches", {})
        self.failures: list[str] = []

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
            layout = self.specs[module_name].tensor_layout(*dense_shape(model, module_name))
            return sum(_nbytes(entry.shape, entry.dtype) for entry in layout.values()) / param.numel()
        if hasattr(param, "n_weights"):  # codes, whose numel() counts weights
            return param.nelement() * param.element_size() / max(1, param.numel())
        return param.element_size()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Tensors of quantized layers keep the dtype of the file: a wrong one must be found, not cast away."""
        name = converter.target_patterns[0] if getattr(converter, "target_patterns", None) else ""
        module_name, _, tensor_name = name.rpartition(".")
        if module_name.removesuffix(".branch") in self.specs and tensor_name != "bias":
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            self.specs = quantizable_modules(model, self.quantization_config)
            return
        self.specs = rename_to_model(self.quantization_config.specs, model)
        check_headers(checkpoint_files or [], self.specs, model)
        self._place_empty_layers(model)
        for stored_name, rank in self.branches.items():
            name = model_name(stored_name, self.specs, model)
            if name is not None:  # as in rename_to_model: the head of a model without one
                layer = cast(QuantizedLinear, model.get_submodule(name))
                shape = {"out_features": layer.out_features, "in_features": layer.in_features}
                layer.add_branch(LowRankBranch.empty(rank, **shape, dtype=layer.compute_dtype, device="meta"))

    def _place_empty_layers(self, model: PreTrainedModel) -> None:
        for name, spec in self.specs.items():
            place_empty_layer(model, name, spec, compute_dtype=self.compute_dtype, device="meta")

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
            if layer.branch is not None:
                layer.branch.requires_grad_(False)
        self.quantization_config = QuantlayersConfig.from_model(model)
        self._attach(model)

    def _attach(self, model: PreTrainedModel) -> None:
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
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict]:
        """Nothing of its own. transformers asks right before it saves: the config is brought up to date here."""
        self.quantization_config = QuantlayersConfig.from_model(model)
        model.config.quantization_config = self.quantization_config
        return None, {}

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return self.is_training_codes

    @property
    def is_compileable(self) -> bool:
        return True


def _fits_in(dtype: torch.dtype, layer: QuantizedLinear) -> bool:
    """Whether ``dtype``, to which the ``aqlm`` package casts scales and codebooks, holds those of a layer."""
    wider = [
        tensor
        for name, tensor in layer.quantized_weight.tensors.items()
        if name != layer.spec.codes_name and dtype == torch.float16 != tensor.dtype and not tensor.is_meta
    ]
    return all((tensor.to(dtype).float() - tensor).norm() <= MAX_SCALE_ERROR * tensor.norm() for tensor in wider)


def _check_loaded(name: str, layer: QuantizedLinear) -> None:
    for tensor_name, parameter in layer.named_parameters():
        if not getattr(parameter, "_is_hf_initialized", False):
            raise ValueError(f"the checkpoint lacks the tensor {name}.{tensor_name}. Download or save it again.")
    if layer.codes.device.type != "meta":
        layer.quantized_weight.check(name)
        for tensor_name, parameter in [] if layer.branch is None else layer.branch.named_parameters():
            if not torch.isfinite(parameter).all():
                raise ValueError(f"{name}.branch.{tensor_name} holds NaN or Inf: the checkpoint is damaged.")


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
