"""PEFT's view of scale-only finetuning: which layers a config means, and its place in PEFT's tables."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..formats.quantized_weight import weight_checksum
from ..layers import QuantizedLinear
from ..layers.norms import is_norm
from ..scales.scales_config import BIASES, NORMS, QuantScalesConfig, QuantScalesType
from ..scales.tuned_layers import QuantScalesLayer, QuantScalesLinear, QuantScalesNorm
from .pattern_check import check_patterns

# Modules that an error message names; a model has hundreds.
SHOWN_NAMES = 3


class QuantScalesModel(BaseTuner):
    """The tuner behind :class:`QuantScalesConfig`; made by ``get_peft_model``, not by hand."""

    prefix = "quant_scales_"
    tuner_layer_cls = QuantScalesLayer
    target_module_mapping: dict[str, list[str]] = {}

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._refuse_unmergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        self._refuse_unmergeable(adapter_names)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _refuse_unmergeable(self, adapter_names: list[str] | None) -> None:
        for module in self.model.modules():
            if isinstance(module, QuantScalesLayer):
                module.adapter_to_merge(adapter_names)

    def _prepare_adapter_config(self, peft_config: QuantScalesConfig, model_config: dict) -> QuantScalesConfig:
        """A copy, so that the user's config can be used for another model as well."""
        own = copy.copy(peft_config)
        for name, config in self.peft_config.items():
            if config is peft_config:
                self.peft_config[name] = own
        return own

    def _prepare_model(self, peft_config: QuantScalesConfig, model: nn.Module) -> None:
        """All checks are made here, before the model is changed."""
        check_patterns(peft_config, model)
        peft_config.plan = plan_of(peft_config, model)
        peft_config.base_crc32 = _checked_base(peft_config, model)

    @staticmethod
    def _check_target_module_exists(peft_config: QuantScalesConfig, key: str) -> Any:
        if key in peft_config.plan:
            return True
        found = check_target_module_exists(peft_config, key)
        return False if found else found  # which also says whether the module was excluded

    def _create_and_replace(
        self,
        peft_config: QuantScalesConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        names = peft_config.plan[current_key]
        if isinstance(target, QuantScalesLayer):
            target.update_layer(adapter_name, names)
            return
        layer_type = QuantScalesLinear if isinstance(target, QuantizedLinear) else QuantScalesNorm
        layer = layer_type(target, adapter_name, names, layer_name=current_key)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse ``adapter_names`` of a mixed batch, which PEFT ignores silently for a tuner without support."""
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                "adapter_names: scale-only finetuning has no mixed batches, since each adapter is another weight. "
                "Run one batch for each adapter, after set_adapter(name)."
            )
        yield


def plan_of(config: QuantScalesConfig, model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Names of the tensors to train for each module that ``config`` selects in ``model``.

    "all-linear" in ``config`` is replaced by the names that it selects, as in PEFT's own methods.

    Raises:
        ValueError: there is nothing to train for a name in ``config``, or a target that cannot be trained; says which.
    """
    modules = dict(_outer_modules(model))
    quantized = {name for name, module in modules.items() if isinstance(_base(module), QuantizedLinear)}
    if not quantized:
        raise ValueError(
            "the model has no quantized layer to tune the scales of. Quantize it first: "
            "peft_quantlayers.quantize_model(model, config), or from_pretrained(..., quantization_config=config)."
        )
    merged = [name for name, module in modules.items() if isinstance(module, BaseTunerLayer) and module.merged]
    if merged:
        raise ValueError(f"{_some(merged)}: an adapter is merged. Call unmerge_adapter() before adding another one.")
    if config.target_modules == "all-linear":
        linears = _maybe_include_all_linear_layers(config, model).target_modules & quantized
        config.target_modules = set(_not_excluded(config, linears))
    targets = [name for name in modules if check_target_module_exists(config, name)] if config.target_modules else []
    _refuse_other_modules(targets, modules)

    plan = {name: _tensor_names(config, _base(modules[name])) for name in targets}
    missing = {role for role in config.train if role != NORMS}
    for name, tensor_names in plan.items():
        missing -= {_role(_base(modules[name]), tensor_name) for tensor_name in tensor_names}
    if missing:
        present = {role for name in targets for role in _roles(_base(modules[name])).values()}
        said = f"have only {sorted(present)}" if targets else f"match no quantized layer (such as {_some(quantized)})"
        raise ValueError(
            f"train={config.train!r}: there are no {sorted(missing)} to train: the modules of "
            f"target_modules={_some(config.target_modules or [])} {said}."
        )
    if NORMS in config.train:
        norms = _norms(config, modules)
        if not norms:
            raise ValueError(f"train={config.train!r}: the model has no norm layer that is not excluded.")
        plan |= norms
    return {name: tensor_names for name, tensor_names in plan.items() if tensor_names}


def _outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Named modules, without what lies inside adapters."""
    wrapper = None
    for name, module in model.named_modules():  # what lies inside a wrapper follows it at once
        if not name or (wrapper is not None and name.startswith(f"{wrapper}.")):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            wrapper = name
        yield name, module


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _not_excluded(config: QuantScalesConfig, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that ``exclude_modules``, ``modules_to_save`` and ``layers_to_transform`` allow."""
    # By their endings: PEFT does not check the layer of a module that is named in full.
    by_ending = copy.copy(config)
    by_ending.target_modules = {name.rpartition(".")[2] for name in names}
    return [name for name in names if check_target_module_exists(by_ending, name)]


def _refuse_other_modules(targets: list[str], modules: dict[str, nn.Module]) -> None:
    for name in targets:
        _refuse_other_adapter(name, modules[name])
        if isinstance(modules[name], QuantScalesLinear | QuantizedLinear):
            continue
        raise ValueError(
            f"{name} is not a quantized layer but a {type(modules[name]).__name__}: it has no scales to train. Leave "
            f"it out with exclude_modules=[{name!r}], or train it in full with modules_to_save."
        )


def _refuse_other_adapter(name: str, module: nn.Module) -> None:
    if isinstance(module, BaseTunerLayer) and not isinstance(module, QuantScalesLayer):
        raise ValueError(
            f"{name} carries an adapter of another kind ({type(module).__name__}). Merge it or unload it first."
        )


def _roles(layer: QuantizedLinear) -> dict[str, str]:
    """Tensor name to role."""
    roles: dict[str, str] = dict(layer.spec.trainable_roles(layer.out_features, layer.in_features))
    return roles if layer.bias is None else roles | {"bias": BIASES}


def _role(layer: QuantizedLinear, tensor_name: str) -> str:
    return _roles(layer)[tensor_name]


def _tensor_names(config: QuantScalesConfig, layer: QuantizedLinear) -> tuple[str, ...]:
    return tuple(name for name, role in _roles(layer).items() if role in config.train)


def _norms(config: QuantScalesConfig, modules: dict[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    norms = {name: _base(module) for name, module in modules.items() if is_norm(_base(module))}
    names = _not_excluded(config, norms)
    for name in names:
        _refuse_other_adapter(name, modules[name])
    return {name: tuple(parameter_name for parameter_name, _ in norms[name].named_parameters()) for name in names}


def _checked_base(config: QuantScalesConfig, model: nn.Module) -> dict[str, int]:
    """Checksum of each planned layer's quantized tensors; ValueError if ``config`` was saved with another one."""
    saved = config.base_crc32 or {}
    found = {}
    for name in config.plan:
        layer = _base(model.get_submodule(name))
        if not isinstance(layer, QuantizedLinear):
            continue  # a norm
        weight = layer.quantized_weight
        if any(type(tensor) is not torch.Tensor or tensor.is_meta for tensor in weight.tensors.values()):
            continue  # sharded, or not there to be read
        found[name] = weight_checksum(weight)
        if saved.get(name, found[name]) != found[name]:
            raise ValueError(
                f"{name}: the adapter was trained on other codes, zeros, codebooks or scales than this base has "
                f"({layer.spec}), and is valid for those only. Load it onto the base that it was trained on "
                f"(base_model_name_or_path={config.base_model_name_or_path!r}), quantized in the same way."
            )
    return found


def _some(names: Any) -> str:
    if isinstance(names, str):
        return repr(names)
    names = sorted(names)
    return f"{names[:SHOWN_NAMES]}" + (f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else "")


def register() -> None:
    """Add scale-only finetuning to PEFT's tables. (``register_peft_method`` takes names of PEFT's enum only.)"""
    for table, entry in _entries():
        table[QuantScalesType.QUANT_SCALES] = entry


def unregister() -> None:
    """Remove it from PEFT's tables."""
    for table, _ in _entries():
        table.pop(QuantScalesType.QUANT_SCALES, None)


def _entries() -> list[tuple[dict[Any, Any], Any]]:
    return [
        (PEFT_TYPE_TO_CONFIG_MAPPING, QuantScalesConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, QuantScalesModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, QuantScalesModel.prefix),
    ]
