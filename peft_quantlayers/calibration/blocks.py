"""A model as a row of blocks: find them, record what they are called with, run one of them alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """One call of a block: its hidden states, and all else it was given. ``position``: which argument they are."""

    hidden: Tensor
    args: tuple
    kwargs: dict[str, Any]
    position: int | str

    def __call__(self, block: nn.Module) -> Tensor:
        """The block's output for the same call, its first part where it returns several."""
        device = device_of(block, self.hidden.device)
        args, kwargs = _moved((self.args, self.kwargs), device)
        hidden = self.hidden.to(device)
        if isinstance(self.position, int):
            args = (*args[: self.position], hidden, *args[self.position + 1 :])
        else:
            kwargs = kwargs | {self.position: hidden}
        output = block(*args, **kwargs)
        return output[0] if isinstance(output, (tuple, list)) else output

    def with_hidden(self, hidden: Tensor) -> "Call":
        """The same call with other hidden states."""
        return replace(self, hidden=hidden.to(self.hidden.device))


def device_of(module: nn.Module, default: torch.device) -> torch.device:
    """Where its first parameter is; ``default`` without any."""
    return next((parameter.device for parameter in module.parameters()), default)


def find_blocks(model: nn.Module, names: list[str]) -> list[str]:
    """Names of the repeated blocks that hold most of the modules ``names``, in order; none where there are none."""
    best: tuple[int, list[str]] = (1, [])
    for list_name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        blocks = [f"{list_name}.{index}" if list_name else str(index) for index in range(len(module))]
        held = sum(any(name.startswith(f"{block}.") for name in names) for block in blocks)
        # An outer list wins over one inside its blocks (experts): there is one of it.
        if held > best[0]:
            best = (held, blocks)
    return best[1]


class Stop(Exception):
    """Ends a forward pass early: what was wanted has been seen. Raised by hooks."""


@torch.no_grad()
def record_calls(model: nn.Module, blocks: list[str], batches: list[Tensor]) -> dict[str, list[Call]]:
    """How each block is called in a forward pass over each batch; hidden states are kept for the first block only.

    Raises:
        ValueError: a block was not called, or more than once in a pass; hidden states that are not finite.
    """
    calls: dict[str, list[Call]] = {name: [] for name in blocks}

    def record(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            call = _as_call(args, kwargs)
            if call.hidden.is_floating_point() and not torch.isfinite(call.hidden).all():
                raise ValueError(
                    f"the inputs of {name} hold NaN or Inf on the calibration data: the model is broken, or overflows "
                    f"in {call.hidden.dtype}. Nothing was changed."
                )
            calls[name].append(call if name == blocks[0] else call.with_hidden(call.hidden.new_empty(0)))
            if name == blocks[-1]:
                raise Stop

        return hook

    hooks = {name: record(name) for name in blocks}
    for call in model_calls(model, batches):
        run_until(model, call, hooks)
    wrong = [name for name, made in calls.items() if len(made) != len(batches)]
    if wrong:
        raise ValueError(f"cannot calibrate block by block: {wrong[:3]} do not run exactly once in a forward pass.")
    return calls


def model_calls(model: nn.Module, batches: list[Tensor]) -> list[Call]:
    """Calls of the whole model, seen as one block."""
    keyword = getattr(model, "main_input_name", None)
    takes_cache = getattr(getattr(model, "config", None), "use_cache", False)
    kwargs = {"use_cache": False} if takes_cache else {}
    if keyword is None:
        return [Call(batch, (None,), kwargs, 0) for batch in batches]
    return [Call(batch, (), kwargs, keyword) for batch in batches]


def run_until(block: nn.Module, call: Call, hooks: dict[str, Callable]) -> None:
    """Run ``block`` with pre-forward hooks ``(module, args, kwargs)`` by module name; one may raise ``Stop``."""
    with hooked(hooks, block), suppress(Stop):
        call(block)


@contextmanager
def hooked(hooks: dict[str, Callable], parent: nn.Module) -> Iterator[None]:
    """Pre-forward hooks on modules of ``parent`` by name, taken off again."""
    handles = [
        parent.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True) for name, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode, each module's own mode put back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def input_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """What a layer that is called so reads."""
    return args[0] if args else next(iter(kwargs.values()))


def _as_call(args: tuple, kwargs: dict[str, Any]) -> Call:
    if args and isinstance(args[0], Tensor):
        return Call(args[0], args, kwargs, 0)
    keyword = next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
    if keyword is None:
        raise ValueError("cannot calibrate: a block is called without a tensor.")
    return Call(kwargs[keyword], args, {name: value for name, value in kwargs.items() if name != keyword}, keyword)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
