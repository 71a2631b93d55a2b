"""The ``quantization_config`` that ``from_pretrained`` is given: a mapping, transformers' own, or one too many."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..formats import QuantSpec
from ..formats.checkpoint import QUANT_METHOD, specs_from_json
from ..formats.published_aqlm import SCHEME
from ..methods import HQQConfig, QuantConfig, get_method, spec_from_dict
from ..methods.config import config_type

# Fields of a checkpoint's config, which no config to quantize with has.
_STORED_FIELDS = {"format_version", "modules", "specs", "quant_config"}
# What hqq writes into its settings and our layers do not have, with the value that changes nothing; None for any.
_HQQ_EXTRAS: dict[str, Any] = {
    "channel_wise": True, "optimize": True, "quant_zero": False, "quant_scale": False, "round_zero": None,
    "view_as_float": None, "offload_meta": None, "scale_quant_params": None, "zero_quant_params": None,
}  # fmt: skip
_ANY = ("round_zero", "view_as_float", "offload_meta")


def is_to_quantize_with(fields: Mapping[str, Any]) -> bool:
    """Whether a mapping of quant_method "quantlayers" is a :class:`QuantConfig`, and not that of a checkpoint."""
    return fields.get("quant_method") == QUANT_METHOD and not _STORED_FIELDS & fields.keys()


def config_from_mapping(fields: Mapping[str, Any]) -> QuantConfig:
    """The config that ``to_dict()`` of one wrote.

    Raises:
        TypeError: an unknown field, or a value of the wrong type.
        ValueError: no method is named, or a value is wrong.
    """
    method = fields.get("method")
    if not isinstance(method, str):
        raise ValueError(
            f'a quantization_config of quant_method {QUANT_METHOD!r} must name its method, for example {{"method": '
            f'"hqq", "nbits": 4}}; got {dict(fields)}.'
        )
    return config_type(get_method(method).spec_type).from_dict(dict(fields))


def hqq_config(fields: Mapping[str, Any]) -> QuantConfig:
    """Our config for the fields of transformers' ``HqqConfig``, given flat, or as that or ``hqq`` nests them.

    Raises:
        ValueError: a field that is not known, or that asks for what our layers do not have.
    """
    own = {name: value for name, value in fields.items() if name not in ("quant_method", "skip_modules")}
    nested = [own.pop(name) for name in ("quant_config", "dynamic_config") if name in own]
    nested = [settings for settings in nested if settings]
    if len(nested) > 1 or any(not isinstance(settings, Mapping) for settings in nested):
        raise ValueError(f"quantization_config of quant_method 'hqq': {dict(fields)} must have one set of settings.")
    skip = fields.get("skip_modules")
    skip = tuple(name for name in skip or () if name != "lm_head") or None
    settings = nested[0] if nested else {}
    if "weight_quant_params" in settings or any(name in settings for name in ("nbits", "group_size")):
        return HQQConfig(skip_modules=skip, **_hqq_fields(settings), **_hqq_fields(own))
    overrides = {tag: _hqq_fields(tagged) for tag, tagged in settings.items()}
    if overrides:
        own["overrides"] = overrides
    return HQQConfig(skip_modules=skip, **_hqq_fields(own))


def _hqq_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    settings = {**settings, **(settings.get("weight_quant_params") or {})}
    known = {field.name for field in dataclasses.fields(HQQConfig)}
    wanted = {}
    for name, value in settings.items():
        if name == "weight_quant_params":
            continue
        if name in _HQQ_EXTRAS:
            if name not in _ANY and value is not None and value != _HQQ_EXTRAS[name]:
                raise ValueError(
                    f"quantization_config of quant_method 'hqq': {name}={value!r} is not supported; leave it out."
                )
        elif name in known:
            wanted[name] = value
        else:
            raise ValueError(
                f"quantization_config of quant_method 'hqq' has no field {name!r}; it has {sorted(known)}."
            )
    return wanted


def refuse_disagreement(fields: Mapping[str, Any], given: Any) -> None:
    """Raise ValueError if ``given``, a config to quantize with, is not what the saved model was quantized with.

    Args:
        fields: the ``quantization_config`` in the model's config.json.
        given: what the caller passed with that model; a mapping or an object.
    """
    advice = "A saved model is loaded as it is: leave out quantization_config, or load the float model."
    config = given
    if not isinstance(given, QuantConfig):
        mapping = given if isinstance(given, Mapping) else given.to_dict()
        method = getattr(mapping.get("quant_method"), "value", mapping.get("quant_method"))
        if method == "hqq":
            config = hqq_config(mapping)
        elif is_to_quantize_with(mapping):
            config = config_from_mapping(mapping)
        elif method == fields["quant_method"]:
            return  # of a checkpoint, this one's or an equal one's
        else:
            raise ValueError(
                f"the model is saved quantized (quant_method {fields['quant_method']!r}), and quantization_config "
                f"asks for {method!r}. {advice}"
            )
    if found := _disagreement(_stored_layers(fields), config):
        raise ValueError(
            f"the model is saved quantized, and quantization_config asks for something else: {found} {advice}"
        )


def _stored_layers(fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What is known of the stored layers by name; of published checkpoints, that have no list, one without a name."""
    try:
        if fields["quant_method"] == QUANT_METHOD:
            own = {name: value for name, value in fields.items() if name != "compute_dtype"}
            return {name: spec.to_dict() for name, spec in specs_from_json(own, spec_from_dict).items()}
        if fields["quant_method"] == "aqlm":
            return {"": {"method": "aqlm"} | {name: fields[name] for name in SCHEME}}
        settings = fields["quant_config"]["weight_quant_params"]
        return {"": {"method": "hqq"} | {name: settings[name] for name in ("nbits", "group_size", "axis")}}
    except (KeyError, TypeError, ValueError):
        return {}  # what is wrong with it is said when it is read


def _disagreement(stored: Mapping[str, Mapping[str, Any]], config: QuantConfig) -> str:
    """The first field whose value in ``config`` no stored layer has; empty if there is none."""
    skipped = [name for name in stored if config.is_skipped(name)]
    if skipped:
        return f"skip_modules leaves {skipped[0]} dense, which is quantized."
    pairs = [(_spec_dicts(config.spec_for(name)), layer) for name, layer in stored.items()]
    for field in ("method", *(field.name for field in dataclasses.fields(config.spec_type))):
        values = [layer[field] for _, layer in pairs if field in layer]
        wanted = [[spec.get(field) for spec in specs] for specs, layer in pairs if field in layer]
        if values and not any(value in accepted for value, accepted in zip(values, wanted, strict=True)):
            return f"{field}={wanted[0][0]!r} instead of {values[0]!r}."
    return ""


def _spec_dicts(spec: QuantSpec) -> tuple[dict[str, Any], ...]:
    return spec.to_dict(), spec.widened().to_dict()
