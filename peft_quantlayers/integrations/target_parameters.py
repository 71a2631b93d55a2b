"""PEFT's ``target_parameters`` in a model with quantized experts, whose fused parameters are modules now.

Same names, same order, same nesting as in PEFT's own function, so that an adapter fits the dense model as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from accelerate import init_empty_weights
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..layers.quantized_layers import quantized_stacks
from ..layers.stack import QuantizedStack, parameter_order


def has_stacks(model: nn.Module) -> bool:
    """Whether any experts in ``model`` are quantized."""
    return bool(quantized_stacks(model))


def refuse_stacks_as_modules(module: nn.Module) -> None:
    """Raise ValueError if ``module``, which target_modules names, is a stack of experts, or holds some."""
    stacks = [each for each in (module, *module.children()) if isinstance(each, QuantizedStack)]
    if stacks:
        names = sorted(".".join(each.layer_name.split(".")[-2:]) for each in stacks)
        raise ValueError(
            f"{stacks[0].layer_name}: experts lie in parameters, not in modules that adapters can be on. Name them in "
            f"target_parameters={names} instead of target_modules. The model was not changed."
        )


def inject_in_order(
    tuner: Any, config: Any, model: nn.Module, adapter_name: str, *, low_cpu_mem_usage: bool
) -> list[str]:
    """Put adapters on the parameters that ``config.target_parameters`` names, stacks included; their names.

    Raises:
        ValueError: a name that fits no parameter of the model, or codes of a quantized layer; nothing was changed.
    """
    targets: Sequence[str] = sorted(set(config.target_parameters))
    found = _targeted(model, targets)
    missing = [target for target in targets if not any(_fits(f"{name}.{part}", [target]) for name, part in found)]
    if missing:
        names = sorted({name.rpartition(".")[2] for name in quantized_stacks(model)})
        raise ValueError(
            f"target_parameters={missing} name no parameter of the model. The quantized experts are "
            f"{[f'experts.{name}' for name in names]}; linear layers belong in target_modules. The model was not "
            "changed."
        )
    for module_name, parameter_name in found:
        if not module_name:
            raise ValueError(
                f"the parameter {parameter_name!r} of the model itself cannot have an adapter: its own module would "
                "be wrapped. Put the model into a module."
            )
        key = f"{module_name}.{parameter_name}"
        parent_name, _, target_name = module_name.rpartition(".")
        parent = model.get_submodule(parent_name)
        target = getattr(parent, target_name)
        if isinstance(target, BaseTunerLayer) and not isinstance(target, ParamWrapper):
            raise ValueError(
                f"{module_name} has an adapter of target_modules already, so its parameter {parameter_name!r} can "
                "have none. Name it in one of the two; target_modules=[] names no module."
            )
        tuner._check_target_module_compatiblity(config, model, target_name)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            tuner._create_and_replace(
                config,
                adapter_name,
                _wrapper_of(target, parameter_name) or target,
                target_name,
                parent,
                current_key=key,
                parameter_name=parameter_name,
            )
    return [f"{module_name}.{parameter_name}" for module_name, parameter_name in found]


def _targeted(model: nn.Module, targets: Sequence[str]) -> list[tuple[str, str]]:
    """Module and parameter of all that ``targets`` name, in PEFT's order; modules as without adapters."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, QuantizedStack)):
            continue
        stacks = {child for child, each in module.named_children() if isinstance(each, QuantizedStack)}
        names = parameter_order(module) if stacks else tuple(module._parameters)
        plain_name = name.replace(".base_layer", "")
        for parameter in names:
            is_there = parameter in stacks or module._parameters.get(parameter) is not None
            if is_there and _fits(f"{plain_name}.{parameter}", targets):
                found.append((plain_name, parameter))
    return found


def _fits(key: str, targets: Sequence[str]) -> bool:
    return any(key == target or key.endswith(f".{target}") for target in targets)


def _wrapper_of(module: Any, parameter_name: str) -> Any:
    """The wrapper that an earlier adapter has put around this parameter; None if there is none."""
    while isinstance(module, ParamWrapper):
        if module.parameter_name == parameter_name:
            return module
        module = module.base_layer
    return None
