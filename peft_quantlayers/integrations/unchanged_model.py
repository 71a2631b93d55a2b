"""A model as it was before a call that fails: PEFT and transformers have added an adapter to it by then.

All that Python holds of the model is kept, one level deep: modules, parameters, hooks, PEFT's tables in each layer.
Imports torch only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_CONTAINERS = (dict, list, set)


@contextmanager
def unchanged_after_error(model: nn.Module, *, adapter: str | None = None) -> Iterator[None]:
    """If the body raises, give ``model`` back the modules, attributes and tensors that it had.

    Tensors that were replaced come back. Those that were written to in place do for parameters of the adapter
    ``adapter`` only: a copy is made of them.
    """
    modules = [(module, _attributes(module)) for module in model.modules()]
    parameters = [
        (parameter, parameter.data, parameter.requires_grad, _copy(parameter) if adapter in name.split(".") else None)
        for name, parameter in model.named_parameters()
    ]
    try:
        yield
    except BaseException:
        for module, attributes in modules:
            _put_back(module, attributes)
        for parameter, data, requires_grad, values in parameters:
            parameter.data = data
            parameter.requires_grad = requires_grad
            if values is not None:
                with torch.no_grad():
                    parameter.copy_(values)
        raise


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and the contents of those that are containers."""
    return {
        name: (value, type(value)(value) if type(value) in _CONTAINERS else None)
        for name, value in vars(module).items()
    }


def _put_back(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    own = vars(module)
    own.clear()
    for name, (value, contents) in attributes.items():
        if contents is not None:  # into the same object: torch and PEFT may hold it
            value.clear()
            value.extend(contents) if isinstance(value, list) else value.update(contents)
        own[name] = value


def _copy(parameter: nn.Parameter) -> torch.Tensor | None:
    return None if parameter.is_meta else parameter.detach().clone()
