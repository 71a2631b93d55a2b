"""``train --adapter_type pv``: all of an AQLM model is trained, its codes too; the result is a model, no adapter."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from jsonargparse import Namespace
from torch import nn

from quantlayers_cli.option_names import WrongUsage

from ..estimate import Estimate
from ..estimate.meta_model import quantized_on_meta
from ..layers import AQLMLinear
from ..layers.quantized_layers import quantized_layers
from ..training import PVTuner
from ..training.pv_tuning import check_buffer, check_values
from . import shared_options as options
from .models import is_quantized_already, model_on_meta
from .parsing import VerbParser
from .refused_values import values_refused
from .trl_trainers import trainer_of

OPTIONS = {
    "code_lr": "step of the codes, relative to the weight: 0.3 is 30 % of its root mean square; 0: codebooks only",
    "max_code_change": "fraction of a layer's groups that may get new codes in one step",
    "trust_ratio": "bound on the change of a layer by one step's new codes, relative to its norm",
    "buffer_bytes": "for gradients of dense weights; layers beyond it have their turn in the next step",
}
_DEFAULTS = {name: each.default for name, each in inspect.signature(PVTuner).parameters.items()}
# Options whose names are not those of PVTuner's arguments.
_OPTION_OF = {"lr": "training.learning_rate", "betas": "training.adam_beta1, --training.adam_beta2"}
# Of a trained float32 number: itself, its gradient and AdamW's two moments.
_COPIES = 4


def add_arguments(parser: VerbParser, *, is_chosen: bool) -> None:
    """``--pv.NAME``; where ``is_chosen``, the optimizer's options get the defaults of PVTuner."""
    for name, text in OPTIONS.items():
        parser.add_argument(f"--pv.{name}", type=type(_DEFAULTS[name]), default=_DEFAULTS[name], help=text)
    if is_chosen:
        first, second = _DEFAULTS["betas"]
        parser.set_defaults(
            {
                "training.learning_rate": _DEFAULTS["lr"],
                "training.adam_beta1": first,
                "training.adam_beta2": second,
            }
        )


def check_options(settings: Namespace, *, n_processes: int) -> None:
    """Raise WrongUsage for options that do not go with ``--adapter_type``, before anything is loaded."""
    if settings.adapter_type != "pv":
        for name in OPTIONS:
            if settings.pv[name] != _DEFAULTS[name]:
                raise WrongUsage(f"--pv.{name} is for --adapter_type pv. Give that too, or leave it out.")
        return
    why = "--adapter_type pv trains the model itself"
    if settings.trainer != "sft":
        raise WrongUsage(f"{why}, and --trainer dpo compares it with what it was. Leave one of both out.")
    if settings.merge is not None:
        raise WrongUsage(f"{why}: there is no adapter, and --output is the trained model. Leave out --merge.")
    if settings.fsdp_size is not None or n_processes > 1:
        raise WrongUsage(f"{why} in one process: the codes would differ in several. Call it without a launcher.")
    default = {field.name: field.default for field in dataclasses.fields(trainer_of("sft")[0])}["optim"]
    if str(settings.training.optim) != str(default) or settings.training.weight_decay:
        name = "weight_decay" if settings.training.weight_decay else "optim"
        raise WrongUsage(f"{why} with an optimizer of its own, AdamW without decay. Leave out --training.{name}.")
    if not is_quantized_already(settings.model) and settings.quantization.method != "aqlm":
        raise WrongUsage(
            f"{why}, codes too, which only AQLM has: --quantization.method aqlm. For {settings.quantization.method} "
            "choose --adapter_type lora or scales."
        )
    try:
        check_values(**_values(settings))
    except (TypeError, ValueError) as error:
        name = str(error).partition("=")[0]
        raise WrongUsage(f"--{_OPTION_OF.get(name, f'pv.{name}')}: {error}") from None


def _values(settings: Namespace) -> dict[str, Any]:
    """What PVTuner takes besides a model."""
    training = settings.training
    return {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        **vars(settings.pv),
    }


def check_float_model(settings: Namespace) -> None:
    """Raise an error where the float model, once quantized, could not be trained so; it is made without numbers.

    Raises:
        ValueError: it would have no AQLM layer.
        WrongUsage: ``--pv.buffer_bytes`` is too small for a layer.
    """
    if settings.adapter_type != "pv":
        return
    model = model_on_meta(settings.model)
    quantized_on_meta(model, options.method_config(settings.quantization))
    _check_layers(settings.model, model)
    layers = {name: each for name, each in quantized_layers(model).items() if isinstance(each, AQLMLinear)}
    with values_refused():
        check_buffer(layers, code_lr=settings.pv.code_lr, buffer_bytes=settings.pv.buffer_bytes)


def new_tuner(settings: Namespace, model: nn.Module) -> PVTuner | None:
    """The optimizer of ``model``, whose codebooks and scales become float32 and trainable; None for an adapter.

    Raises:
        ValueError: the model has no AQLM layer.
        WrongUsage: a value out of range.
    """
    if settings.adapter_type != "pv":
        return None
    _check_layers(settings.model, model)
    with values_refused():
        return PVTuner(model, **_values(settings))


def costs(name: str, model: nn.Module, buffer_bytes: int, n_bytes: int) -> Estimate:
    """What training ``model`` takes, which is quantized and on the meta device, and ``n_bytes`` in files."""
    _check_layers(name, model)
    layers = [layer for layer in quantized_layers(model).values() if isinstance(layer, AQLMLinear)]
    trained = sum(layer.get_parameter(each).numel() for layer in layers for each in ("codebooks", "scales"))
    dense = sum(layer.in_features * layer.out_features for layer in layers)
    memory = {"weights": n_bytes, "codebooks": 4 * _COPIES * trained, "gradients": min(buffer_bytes, 4 * dense)}
    return Estimate(step="train", memory=memory, disk=n_bytes + 4 * trained, notes=("without activations",))


def _check_layers(name: str, model: nn.Module) -> None:
    if not any(isinstance(layer, AQLMLinear) for layer in quantized_layers(model).values()):
        raise ValueError(
            f"--adapter_type pv trains codes of AQLM layers, and {name} has none. Quantize its float model so "
            "(--method aqlm), or choose --adapter_type lora or scales."
        )
