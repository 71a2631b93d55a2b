"""What a user passes as ``quantization_config``: a config of ours, one of transformers', or a mapping of fields."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import AqlmConfig, HqqConfig

from ..formats import QuantSpec
from ..formats.checkpoint import QUANT_METHOD
from ..formats.published_aqlm import SCHEME
from ..layers.dense_rules import declared_embeddings
from ..layers.dense_types import dense_names, dense_shape
from ..layers.embedding_tables import asked_specs
from ..methods import AQLMConfig, HQQConfig, QuantConfig, get_method
from ..methods.quant_config import config_type, matches
from .transformers_config import QuantlayersConfig

logger = logging.getLogger(__name__)

# Entries of the hqq package that say how it stores and computes, and change no weight here.
_HQQ_STORAGE = ("view_as_float", "offload_meta", "quant_method")
# Quantized scales and zeros: here both are floating.
_HQQ_METADATA = ("quant_scale", "quant_zero", "scale_quant_params", "zero_quant_params")


def quant_config_of(given: Any) -> QuantConfig:
    """The config to quantize with.

    Args:
        given: a :class:`QuantConfig`; transformers' ``HqqConfig``; or a mapping: ``to_dict()`` of either, or
            ``{"quant_method": "hqq", "nbits": 8, ...}`` with the fields of :class:`HQQConfig` or ``HqqConfig``.

    Raises:
        ValueError, TypeError: another kind of config, an unknown field, or a value out of range.
    """
    if isinstance(given, QuantConfig):
        return given
    if isinstance(given, QuantlayersConfig):
        given = given.fields
    if isinstance(given, HqqConfig):
        return _of_hqq_settings(given.quant_config or {}, given.skip_modules)
    if isinstance(given, AqlmConfig):
        raise _aqlm_refusal({name: getattr(given, name, "...") for name in SCHEME})
    if not isinstance(given, Mapping):
        raise TypeError(
            f"quantization_config must be an HQQConfig or another QuantConfig, got {type(given).__name__}. From a "
            "mapping of fields: HQQConfig(**fields)."
        )
    method = given.get("quant_method")
    if method == QUANT_METHOD:
        return _of_own_fields(dict(given))
    if method == "hqq":
        return _of_hqq_fields(dict(given))
    raise _aqlm_refusal({name: given.get(name, "...") for name in SCHEME})


def without_untagged(config: QuantConfig, given: Any, model: nn.Module) -> QuantConfig:
    """``config`` with the layers that no tag of a ``dynamic_config`` in ``given`` means skipped: float in ``hqq``."""
    if not config.overrides or not _has_tags(given):
        return config
    untagged = [name for name in dense_names(model) if not any(matches(name, tag) for tag in config.overrides)]
    return dataclasses.replace(config, skip_modules=(*(config.skip_modules or ()), *untagged))


def _has_tags(given: Any) -> bool:
    """Whether ``given`` has one setting of the hqq package for each layer tag."""
    fields = given.to_dict() if isinstance(given, (HqqConfig, QuantlayersConfig)) else {}
    settings = fields.get("quant_config") or fields.get("dynamic_config") or {}
    return bool(settings) and not {"weight_quant_params", "nbits"} & set(settings)


def _of_own_fields(fields: dict[str, Any]) -> QuantConfig:
    if "method" not in fields:
        said = "the fields of a saved model" if "modules" in fields else f"the fields {sorted(fields)}"
        raise ValueError(
            f"quantization_config has quant_method={QUANT_METHOD!r} and {said}. To quantize with it, it needs a "
            '"method", for example {"quant_method": "quantlayers", "method": "hqq", "nbits": 4}, as '
            "HQQConfig(nbits=4).to_dict() gives it."
        )
    return config_type(get_method(fields["method"]).spec_type).from_dict(fields)


def _of_hqq_fields(fields: dict[str, Any]) -> QuantConfig:
    skip = fields.pop("skip_modules", None)
    settings = fields.pop("quant_config", None) or fields.pop("dynamic_config", None)
    if settings is not None:
        if others := sorted(set(fields) - {*_HQQ_STORAGE}):
            raise ValueError(f"quantization_config has quant_config or dynamic_config, and beside it {others}.")
        return _of_hqq_settings(settings, skip)
    return HQQConfig(skip_modules=_without_head(skip), **_hqq_fields(fields))


def _of_hqq_settings(settings: Mapping[str, Any], skip: Any) -> QuantConfig:
    """Of the hqq package's settings: one setting, or one for each layer tag."""
    skip = _without_head(skip)
    if "weight_quant_params" in settings or "nbits" in settings:
        return HQQConfig(skip_modules=skip, **_hqq_fields(settings))
    overrides = {tag: _hqq_fields(tagged) for tag, tagged in settings.items()}
    return HQQConfig(skip_modules=skip, overrides=overrides or None)


def _without_head(skip: Any) -> tuple[str, ...] | None:
    """Patterns without the head's, which our configs leave dense by themselves."""
    return tuple(name for name in skip or () if name != "lm_head") or None


def _hqq_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of :class:`HQQConfig`, which refuses unknown ones, from an entry of the hqq package or a flat mapping."""
    for name in _HQQ_METADATA:
        if settings.get(name):
            raise ValueError(
                f"quantization_config: {name}={settings[name]!r} asks for quantized scales and zeros, which are "
                "floating here. Leave it out; larger groups (group_size) make them smaller."
            )
    if "weight_quant_params" in settings:  # the other entries say how the package searches
        nested = settings["weight_quant_params"]
        return {name: nested[name] for name in ("nbits", "group_size", "axis") if name in nested}
    ignored = (*_HQQ_STORAGE, *_HQQ_METADATA)
    return {name: value for name, value in settings.items() if name not in ignored and value is not None}


def _aqlm_refusal(scheme: Mapping[str, Any]) -> ValueError:
    return ValueError(
        "transformers' AqlmConfig cannot quantize a model. Use peft_quantlayers.AQLMConfig("
        + ", ".join(f"{name}={value}" for name, value in scheme.items())
        + ")."
    )


def asked_config(given: Any) -> QuantConfig:
    """The config that a user passes beside a saved model; raises as :func:`quant_config_of`."""
    if isinstance(given, AqlmConfig):
        return AQLMConfig(**{name: getattr(given, name) for name in SCHEME})
    if isinstance(given, QuantlayersConfig):
        raise ValueError(
            "quantization_config is that of another saved model, and this one is quantized already. Leave it out."
        )
    return quant_config_of(given)


def compare_with_asked(asked: QuantConfig, specs: Mapping[str, QuantSpec], model: nn.Module) -> None:
    """Warn that a saved model is quantized already, as ``asked`` says.

    Args:
        asked: what the user passed as ``quantization_config``.
        specs: of the saved model's layers, by module name.
        model: with dense modules of these names.

    Raises:
        ValueError: ``asked`` asks for something else; names the first such layer.
    """
    heads = {id(module) for module in declared_embeddings(model, "get_output_embeddings")}
    modules = dict(model.named_modules())
    for name, spec in specs.items():
        module = modules.get(name)  # None for a stack of experts
        possible = asked_specs(asked, name, is_table=isinstance(module, nn.Embedding), is_head=id(module) in heads)
        fitted = [asked.fitted_spec(each, *dense_shape(model, name)[-2:]) for each in possible]
        if not any(_is_stored_as(spec, each) for each in fitted):
            wanted = fitted[0] if fitted else None
            raise ValueError(
                f"the saved model is quantized already: {name} is {spec}, and quantization_config asks for {wanted}. "
                "Leave it out to load the model as it is, or quantize the float model that it was made of."
            )
    logger.warning("the saved model is quantized already, as quantization_config says; it is loaded as it is.")


def _is_stored_as(spec: QuantSpec, wanted: QuantSpec | None) -> bool:
    """Whether a layer that was asked for as ``wanted`` may be stored as ``spec``.

    How the codes were searched is not compared: published formats do not keep it. Nor are dtypes of scales and
    codebooks, which a layer's values may have made wider.
    """
    if wanted is None or spec.method != wanted.method:
        return False
    return all(getattr(spec, name) == getattr(wanted, name) for name in spec.shown_fields)
