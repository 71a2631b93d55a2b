"""The adapter that ``train`` trains: a new one as ``--lora`` or ``--scales`` say, or that of ``--adapter``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from enum import Enum
from typing import Any

from jsonargparse import Namespace
from peft import LoftQConfig, LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from quantlayers_cli.option_names import WrongUsage

from ..layers.quantized_layers import quantized_modules
from ..lora.merge_aware_config import fingerprints_of
from ..scales import QuantScalesConfig
from . import models
from . import shared_options as options
from .parsing import VerbParser, new_parser, yaml_text
from .refused_values import values_refused

# Fields that PEFT fills itself.
OF_PEFT = {"peft_type", "auto_mapping", "peft_version", "inference_mode", "base_model_name_or_path", "revision"}
# What axolotl's option `adapter` takes.
KINDS = ("lora", "qlora")
ALL_LINEAR = "all-linear"


def add_arguments(parser: VerbParser, adapter: str | None = None) -> None:
    """``--lora`` and ``--scales``: the fields of the adapters' configs; defaults are those of ``adapter``, if any."""
    parser.add_class_arguments(LoraConfig, "lora", skip=OF_PEFT, fail_untyped=False)
    parser.set_defaults({"lora.target_modules": ALL_LINEAR, "lora.task_type": "CAUSAL_LM"})
    parser.add_argument("--scales.target_modules", type=list[str] | str | None, default=ALL_LINEAR, help="layers")
    parser.add_argument(
        "--scales.train", type=list[str] | None, default=None, help="tensors to train; null: the scales"
    )
    if adapter is not None:
        try:
            parser.set_defaults(_options_of(models.adapter_config(adapter)))
        except (OSError, ValueError):
            return  # what is wrong with it is said when it is loaded


def _options_of(config: PeftConfig) -> dict[str, Any]:
    """The options that describe the adapter of ``config``, where they are not PEFT's defaults."""
    if isinstance(config, QuantScalesConfig):
        return {"scales.target_modules": _plain(config.target_modules), "scales.train": _plain(config.train)}
    if not isinstance(config, LoraConfig):
        return {}
    defaults, found = LoraConfig(), {}
    for field in dataclasses.fields(LoraConfig):
        value = _plain(getattr(config, field.name))
        if field.name not in OF_PEFT and value not in (_plain(getattr(defaults, field.name)), {}):
            found[f"lora.{field.name}"] = value
    return found


def resolve_names(settings: Namespace) -> None:
    """Fill in what an adapter stands for: its base, its kind, and that it is merge-aware.

    Raises:
        WrongUsage: neither a model nor an adapter is given; options that the adapter contradicts.
        ValueError: it was trained on another kind of model, or is of a kind that is not trained here.
    """
    if settings.adapter in KINDS:
        raise WrongUsage(
            f"--adapter {settings.adapter}: the folder of an adapter to train further is meant. Leave it out for a "
            "new one, whose kind is --adapter_type."
        )
    settings.model, settings.adapter = models.model_and_adapter(settings.model, settings.adapter)
    if settings.adapter is None:
        return
    if settings.adapter_type == "pv":
        raise WrongUsage("--adapter_type pv trains the model itself. Leave out --adapter, or merge it first.")
    config = models.adapter_config(settings.adapter)
    if not isinstance(config, LoraConfig | QuantScalesConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(
            f"--adapter {settings.adapter} is of the kind {kind}; train goes on with LoRA and tuned scales."
        )
    kind = "scales" if isinstance(config, QuantScalesConfig) else "lora"
    if settings.adapter_type == "scales" and kind == "lora":
        raise WrongUsage(f"--adapter_type scales: {settings.adapter} is LoRA. Leave one of both out.")
    settings.adapter_type = kind
    if not models.is_quantized_already(settings.model):
        raise ValueError(
            f"--adapter {settings.adapter} is trained further on the quantized model that it was trained on, and "
            f"{settings.model} is a float one. Leave --model and --quantization.NAME out, or give --model "
            f"{_base_of(settings)}."
        )
    _refuse_contradictions(settings, config)
    settings.merge_aware = settings.merge_aware or fingerprints_of(config) is not None


def _base_of(settings: Namespace) -> str:
    try:
        return models.base_of(settings.adapter)
    except (OSError, ValueError):
        return "FOLDER"


def _refuse_contradictions(settings: Namespace, config: PeftConfig) -> None:
    """Raise WrongUsage for options of an adapter that is there already, and has other values."""
    parser = new_parser("", "")
    add_arguments(parser, settings.adapter)
    own = parser.parse_args([])
    for name, value in vars(settings[settings.adapter_type]).items():
        option, has = f"{settings.adapter_type}.{name}", _plain(own[settings.adapter_type][name])
        given = sorted(value) if isinstance(value, list | set) and name == "target_modules" else _plain(value)
        if given != has and not (name == "target_modules" and given == ALL_LINEAR):  # which the model tells
            raise WrongUsage(
                f"--{option} {yaml_text(given)}: the adapter in {settings.adapter} has {yaml_text(has)}, and "
                "keeps it. Leave the option out; or train a new adapter, without --adapter, on the model with this "
                "one merged."
            )


def check_options(settings: Namespace) -> None:
    """Raise WrongUsage for options of an adapter that is not trained, which would be ignored."""
    parser = new_parser("", "")
    add_arguments(parser)
    defaults = parser.parse_args([])
    for group in sorted({"lora", "scales"} - {settings.adapter_type}):
        for name, value in vars(settings[group]).items():
            if _plain(value) != _plain(defaults[group][name]):
                raise WrongUsage(
                    f"--{group}.{name} is for --adapter_type {group}, and it is {settings.adapter_type}. Leave one of "
                    "both out."
                )


def config_of(settings: Namespace) -> PeftConfig | None:
    """What is trained, as PEFT's config, of the adapter that is there or of a new one; None where it is no adapter."""
    if settings.adapter is not None:
        return models.adapter_config(settings.adapter)
    if settings.adapter_type == "pv":
        return None
    if settings.adapter_type == "scales":
        fields = {name: value for name, value in vars(settings.scales).items() if value is not None}
        with values_refused():
            return QuantScalesConfig(task_type="CAUSAL_LM", **fields)
    options.check_pattern("lora.target_modules", settings.lora.target_modules)
    names = {field.name for field in dataclasses.fields(LoraConfig)} - OF_PEFT
    fields = {name: _plain(value) for name, value in vars(settings.lora).items() if name in names}
    defaults = LoraConfig()
    is_filled_in = fields["loftq_config"] == vars(LoftQConfig())
    if is_filled_in and fields["init_lora_weights"] != "loftq":
        fields.pop("loftq_config")  # from jsonargparse; PEFT would warn of it
    with values_refused():
        return LoraConfig(
            **{name: value for name, value in fields.items() if value != _plain(getattr(defaults, name))}
        )


def put_on(model: PreTrainedModel, settings: Namespace) -> PeftModel:
    """``model`` with the adapter ``--adapter`` on it, trainable, which names ``model`` as its base from now on.

    Raises:
        ValueError: it was trained on another base; or ``--lora.target_modules all-linear``, and it is not on all.
    """
    peft_model = models.with_adapter(model, settings.adapter, is_trainable=True)
    peft_model.active_peft_config.base_model_name_or_path = models.name_of(model)
    if settings.lora.target_modules == ALL_LINEAR:
        bare = _without_adapter(peft_model)
        if bare:
            raise ValueError(
                f"--lora.target_modules {ALL_LINEAR}: the adapter in {settings.adapter} is not on {bare[0]}, and "
                "keeps its layers. Leave the option out."
            )
    return peft_model


def _without_adapter(peft_model: PeftModel) -> list[str]:
    """Names of quantized linear layers that carry no adapter, but for the head."""
    base: Any = peft_model.get_base_model()
    adapted = {module.get_base_layer() for module in base.modules() if isinstance(module, BaseTunerLayer)}
    left_out = {*adapted, base.get_output_embeddings()}
    return [name for name, each in quantized_modules(base).items() if each not in left_out]


def _plain(value: Any) -> Any:
    """jsonargparse's groups as the mappings that they stand for; sets and names as YAML has them."""
    if isinstance(value, Namespace):
        return {name: _plain(each) for name, each in vars(value).items()}
    if dataclasses.is_dataclass(value):
        return vars(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset | tuple):
        return sorted(value) if all(isinstance(each, str) for each in value) else list(value)
    return value


def checked_reference(trainer: Any) -> None:
    """Raise ValueError unless DPO compares an adapter that it goes on with to that adapter as it was.

    TRL keeps a copy of it as the adapter "ref"; without one the reference would be the base without any.
    """
    model = trainer.model
    names: Iterable[str] = model.peft_config
    parameters = dict(model.named_parameters())
    pairs = [(name, name.replace(".default.", ".ref.")) for name in parameters if ".default." in name]
    is_copy = all(copy in parameters and parameters[name].equal(parameters[copy]) for name, copy in pairs)
    if "ref" not in names or not pairs or not is_copy:
        raise ValueError(
            "this TRL and PEFT make no copy of an adapter, to which --trainer dpo would compare it. Install newer "
            "ones: pip install --upgrade trl peft; or merge the adapter, and train a new one on the merged model."
        )
