"""Our quantizer, as transformers sees it. Registered by ``transformers_registry.py``.

* ``from_pretrained(float_model, quantization_config=HQQConfig(...))`` quantizes each weight as it is read.
* ``from_pretrained(saved)`` builds the quantized layers first, each with its real spec, and reads the tensors straight
  into them. Tensors of a published checkpoint in another layout are converted one by one as they are read.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from ..formats import QuantSpec
from ..formats.checkpoint import QUANT_METHOD
from ..layers import dequantize_model, quantizable_modules
from ..layers.codes_parameter import is_sharded
from ..layers.dense_rules import DenseRules
from ..layers.dense_types import dense_shape, dense_type_of
from ..layers.embedding_tables import Table, embedding_tables, quantize_table, stored_tables
from ..layers.expert_types import dense_stacks, find_stack
from ..layers.quantized_layers import quantized_layers
from ..layers.replace_stack import put_stack, quantized_experts
from ..layers.selection import quantizable_tables
from ..methods import spec_from_dict
from .before_training import check_before_training
from .checkpoint_checksums import checksum_metadata, refuse_damage
from .checkpoint_headers import CheckpointFiles, check_headers, check_kinds
from .checkpoint_names import CheckpointNames
from .described_layers import place_described_layers, tensor_names
from .expert_conversion import ExpertByExpert
from .given_config import compare_with_asked, quant_config_of, without_untagged
from .loaded_tensors import check_loaded
from .parallel_loading import refuse_parallel_loading
from .peft_kbit_mark import mark_for_kbit_training, unmark_for_kbit_training
from .private_transformers import kept_dtype
from .sentinels import ignore_sentinels, sentinels, without_sentinels
from .single_experts import StackedTensors, stacked_tensors, stacks_of_layers
from .tensor_conversion import QuantizedTensors, StoredLayers, ignore_tensors, keep_from_conversions
from .transformers_config import QuantlayersConfig
from .weight_operation import QuantizeWeight, joined_failures
from .wide_codes import layers_with_wide_codes, state_with_wide_codes


class QuantlayersHfQuantizer(HfQuantizer):
    """transformers' view of our models: quantize on the fly, or load what was saved."""

    requires_calibration = False
    # Set while a PVTuner trains the layers themselves: the Trainer then takes the model without an adapter.
    is_training_codes = False
    # Not where only headers are looked at.
    are_checksums_checked = True

    def __init__(self, quantization_config: Any, pre_quantized: bool = True, **kwargs: Any) -> None:
        self.given_config = quantization_config
        if not pre_quantized:
            quantization_config = quant_config_of(quantization_config)
        super().__init__(quantization_config, pre_quantized=pre_quantized, **kwargs)
        self.specs: dict[str, QuantSpec] = {}
        # Of a float model: the embedding tables that are quantized once it is loaded, and tied.
        self.tables: dict[str, tuple[Table, QuantSpec]] = {}
        # Of a config to quantize with; a checkpoint's is read with its other fields.
        self.compute_dtype: str | None = getattr(quantization_config, "compute_dtype", None)
        # Where weights are quantized; None for where each is.
        self.device: torch.device | str | None = None
        self.failures: list[str] = []
        # Of a checkpoint: the parameter for each name in its files, and the files in words.
        self.parameters: dict[str, str] = {}
        self.files = ""
        self.quantized_tensors: list[QuantizedTensors | StackedTensors] = []
        # Of the files that are being saved.
        self._metadata: dict[str, str] = {}
        # That it is attached to, while that lives.
        self._model: weakref.ref[PreTrainedModel] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copied or pickled with its model, which is another one then."""
        return vars(self) | {"_model": None}

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
                "device_map sends modules to disk, which quantized layers do not support. Give them a GPU or the CPU: "
                "they are small."
            )

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return not self.pre_quantized and self.quantized_name(param_name) is not None

    def quantized_name(self, param_name: str) -> str | None:
        """The name in ``specs`` of the weight that a parameter is: its module's, or a stack's own; else None."""
        module_name = param_name.removesuffix(".weight")
        return next((name for name in (param_name, module_name) if name in self.specs), None)

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeWeight(self)

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        name = self.quantized_name(param_name)
        if name is not None and not self.pre_quantized:
            layout = self.specs[name].layout_of(dense_shape(model, name))
            return sum(_nbytes(entry.shape, entry.dtype) for entry in layout.values()) / param.numel()
        if hasattr(param, "n_weights"):  # codes, whose numel() counts weights
            return param.nelement() * param.element_size() / max(1, param.numel())
        return param.element_size()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Tensors of quantized layers keep the dtype of the file: a wrong one must be an error, not a cast."""
        if isinstance(converter, (QuantizedTensors, StackedTensors)):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        refuse_parallel_loading(model.config, is_quantizing=not self.pre_quantized)
        if not self.pre_quantized:
            self.quantization_config = without_untagged(self.quantization_config, self.given_config, model)
            self.specs = quantizable_modules(model, self.quantization_config)
            self.tables = quantizable_tables(model, self.quantization_config)
            return
        config = cast(QuantlayersConfig, self.quantization_config)
        files = CheckpointFiles(checkpoint_files or [])
        if self.are_checksums_checked:
            refuse_damage(files.opened, name="the checkpoint")
        description = config.checkpoint_format.read(config.fields, files, spec_from_dict=spec_from_dict)
        names = CheckpointNames(model)
        stacks = stacks_of_layers(model, description, names)
        single = {name for stack in stacks.values() for name in stack.stored_names}
        modules = names.modules(name for name in description.specs if name not in single)
        check_kinds(model, modules, description.stacks, description.embeddings)
        self.specs = {name: description.specs[stored_name] for stored_name, name in modules.items()}
        self.specs |= {name: stack.spec for name, stack in stacks.items()}
        branches = [modules[name] for name in description.branches if name in modules]
        stored_names = tensor_names(model, self.specs, branches)
        stored = {modules[name]: layer for name, layer in description.stored_layers.items() if name in modules}
        stored_layers = StoredLayers(layers_with_wide_codes(self.specs, model) | stored, failures=self.failures)
        stored_layers.check_shapes(model)
        if config.asked is not None:
            compare_with_asked(config.asked, self.specs, model)
        self.files, self.parameters = str(files), names.parameters(files.headers)
        if description.has_sentinels:
            found = without_sentinels(self.parameters, files, self.specs)
            ignore_sentinels(model, self.parameters.keys() - found.keys(), names)
            self.parameters = found
        tied = stored_tables(model, self.specs)
        check_headers(files, self.parameters, self.specs, {*stored, *stacks}, tied, branches, model)
        renamed = names.renamed(key for key, name in self.parameters.items() if name in stored_names)
        self.quantized_tensors = [
            *stacked_tensors(stacks, files.headers, names, self.failures),
            QuantizedTensors({name: self.parameters[key] for key, name in renamed.items()}, stored_layers),
        ]
        place_described_layers(model, description, modules | {name: name for name in stacks}, self.specs)
        ignore_tensors(model, config.checkpoint_format.setting_names)

    # transformers 5.20 calls this without the model.
    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        if not self.pre_quantized:
            weight_conversions = [ExpertByExpert.around(entry, self._quantize_experts) for entry in weight_conversions]
        return [*self.quantized_tensors, *weight_conversions]

    def _quantize_experts(self, model: nn.Module, name: str, n_experts: int, experts: Iterator[torch.Tensor]) -> bool:
        """Quantize the experts of the stack ``name``, each as it is read; False if they stay dense."""
        found = find_stack(model, name)
        if found is None or name not in self.specs or dense_shape(model, name)[0] != n_experts:
            return False
        module, entry = found
        dtype = entry.weight(module).dtype
        if self.compute_dtype is not None:
            wanted = getattr(torch, self.compute_dtype)
            dtype = getattr(torch, kept_dtype(model, name, wanted) or self.compute_dtype)
        weights = (weight.t() if entry.is_transposed else weight for weight in experts)
        try:
            quantized = quantized_experts(weights, n_experts, self.specs[name], layer_name=name, device=self.device)
            put_stack(module, entry, quantized, name=name, compute_dtype=dtype)
        except ValueError as error:
            self.failures.append(str(error))
        return True

    # ---- after loading

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized and not self.failures:
            self._quantize_rest(model)
            self._quantize_tables(model)
        if self.failures:
            raise ValueError(joined_failures(self.failures))
        if self.pre_quantized:
            check_loaded(model, files=self.files, stored=set(self.parameters.values()))
        for layer in quantized_layers(model).values():
            for parameter_name, parameter in layer.named_parameters(recurse=False):
                if parameter_name != "bias":
                    parameter.requires_grad = False  # the loader makes floats trainable
            if layer.branch is not None:
                layer.branch.requires_grad_(False)
        self.quantization_config = QuantlayersConfig.from_model(model)
        self._attach(model)

    def _quantize_rest(self, model: PreTrainedModel) -> None:
        """Quantize what the loader has put into the model by itself: it asks for one weight of several that a
        conversion makes, and for none that the checkpoint lacks. Weights that were tied since are not among it."""
        operation = QuantizeWeight(self)
        rules = DenseRules(model, quantize_lm_head=self.quantization_config.quantize_lm_head)
        stacks = {name for name, _, _ in dense_stacks(model)}
        for name in self.specs:
            if name in stacks:
                operation.convert({name: model.get_parameter(name)}, full_layer_name=name, model=model)
                continue
            module = model.get_submodule(name)
            if dense_type_of(module) is not None and rules.reason(name, module) is None:
                operation.convert({name: module.weight}, full_layer_name=f"{name}.weight", model=model)

    def _quantize_tables(self, model: PreTrainedModel) -> None:
        """Quantize the embedding tables, as they are tied now: a file may have a head that differs from them."""
        specs = {name: spec for table, spec in self.tables.values() for name in table.names}
        for table in embedding_tables(model) if specs else []:
            spec = specs.get(table.names[0])
            if spec is not None and table.stays_dense is None:
                quantize_table(model, table, spec, compute_dtype=self.compute_dtype, device=self.device)

    def _attach(self, model: PreTrainedModel) -> None:
        self.pre_quantized = True
        self._model = weakref.ref(model)
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = QUANT_METHOD
        mark_for_kbit_training(model)
        model.config.quantization_config = self.quantization_config
        model.config._is_quantized = True

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        super().remove_quantization_config(model)
        unmark_for_kbit_training(model)
        model.config._is_quantized = False

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # transformers gives the config's where the caller gave none; it is text once the model was saved. The layers
        # of such a model have it already, but for those that are kept in float32.
        name = str(dtype).removeprefix("torch.")
        is_models_own = dtype is None or name == str(model.config.dtype).removeprefix("torch.")
        return dequantize_model(model, None if is_models_own else getattr(torch, name))

    # ---- what transformers asks about a loaded model

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Any] | None, dict]:
        """Tensors and checksums. transformers asks right before it saves, so the config is brought up to date here."""
        self.quantization_config = QuantlayersConfig.from_model(model)
        model.config.quantization_config = self.quantization_config
        written = model.state_dict()
        keep_from_conversions(model, written)
        self._metadata = {}
        if any(is_sharded(tensor) for tensor in written.values()):
            return None, self._metadata  # gathered_state fills it
        state = self._as_in_files(model, written)
        self._metadata |= checksum_metadata(model, state)
        return state, self._metadata

    def gathered_state(self, model: PreTrainedModel, state: dict[str, Any]) -> dict[str, Any]:
        """``state``, gathered from all processes, as files have it; and its checksums, which go into their headers.

        Empty in processes that write nothing.
        """
        state = self._as_in_files(model, state) if state else state
        self._metadata |= checksum_metadata(model, state) if state else {}
        return state

    def _as_in_files(self, model: PreTrainedModel, state: dict[str, Any]) -> dict[str, Any]:
        """``state`` as files have it, with sentinels unless adapters or a published layout are saved."""
        state = state_with_wide_codes(model, state)
        is_own = self.quantization_config.checkpoint_format.name == QUANT_METHOD
        return state | sentinels(model) if is_own and not getattr(model, "_hf_peft_config_loaded", False) else state

    @property
    def is_trainable(self) -> bool:
        """Yes. transformers' Trainer asks before it trains."""
        model = None if self._model is None else self._model()
        if model is not None:
            check_before_training(model)
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return self.is_training_codes

    @property
    def is_compileable(self) -> bool:
        return True


def gathered_state_of(original: Callable[..., Any], model: Any, model_to_save: Any, *args: Any, **kwargs: Any) -> Any:
    """``gather_sharded_state_dict_for_save`` of a transformers model, which may be quantized and sharded."""
    state = original(model_to_save, *args, **kwargs)
    quantizer = getattr(model_to_save, "hf_quantizer", None)
    was_sharded = any(is_sharded(parameter) for parameter in model_to_save.parameters())
    if not was_sharded or not isinstance(quantizer, QuantlayersHfQuantizer):
        return state
    return quantizer.gathered_state(model_to_save, state)


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
