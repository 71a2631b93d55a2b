"""A model as a row of blocks: find them, and what a block is called with."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache


@dataclass(frozen=True)
class Call:
    """One call of a block, or of a whole model.

    Fields:
        args: as the caller gave them.
        kwargs: likewise.
        autocast: the dtype of the autocast region that the call was made in; None outside of one.
        runs_hooks: whether the module's own forward hooks run too. Those of a block run once only, where the model
            calls it: before its arguments are taken, and on the output that is given back.
        masks: (batch, length) each, True for the tokens that are no padding; none where all count.
    """

    args: tuple
    kwargs: dict[str, Any]
    autocast: torch.dtype | None = None
    runs_hooks: bool = False
    masks: tuple[Tensor, ...] = ()

    @property
    def hidden(self) -> Tensor:
        """Its hidden states: the first tensor among the positional arguments, else among those by keyword.

        Raises:
            ValueError: there is none.
        """
        for value in (*self.args[:1], *self.kwargs.values()):
            if isinstance(value, Tensor):
                return value
        raise ValueError("cannot calibrate: a block is called without a tensor.")

    def run(self, module: nn.Module) -> Any:
        """All that ``module`` returns for this call, on the module's device."""
        device = device_of(module, self.hidden.device)
        args, kwargs = moved(self.args, device), {name: moved(value, device) for name, value in self.kwargs.items()}
        with nullcontext() if self.autocast is None else torch.autocast(device.type, dtype=self.autocast):
            return module(*args, **kwargs) if self.runs_hooks else module.forward(*args, **kwargs)

    def real_tokens(self, x: Tensor) -> Tensor:
        """The rows of ``x`` (..., features) that are no padding, (n, features); ``x`` itself if no mask has its shape.

        Where encoder and decoder are of one length, the masks of both count.
        """
        fitting = [mask for mask in self.masks if x.shape[:-1] in (mask.shape, (mask.numel(),))]
        if not fitting:
            return x
        rows = x.reshape(-1, x.shape[-1])
        return rows[torch.stack([mask.flatten().to(x.device) for mask in fitting]).all(0)]

    def __call__(self, module: nn.Module) -> Tensor:
        """The hidden states that ``module`` returns: the first part of its output where it returns several."""
        return hidden_of(self.run(module))


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returned."""
    if isinstance(output, Mapping):
        return next(iter(output.values()))
    return output[0] if isinstance(output, (tuple, list)) else output


def device_of(module: nn.Module, default: torch.device) -> torch.device:
    """Where its first parameter is; ``default`` without any."""
    return next((parameter.device for parameter in module.parameters()), default)


def find_block_lists(model: nn.Module, names: list[str]) -> list[list[str]]:
    """Names of the repeated blocks that hold the modules ``names``: list by list, the one that holds most first.

    An encoder and a decoder, or a vision tower and a language model, have a list each. A list inside a block of
    another one (experts) is part of that block. A list of which fewer than two blocks hold any of the modules is none.
    """
    found: list[tuple[int, list[str]]] = []
    outer: tuple[str, ...] = ()
    for list_name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or list_name.startswith(outer or ("\0",)):
            continue
        blocks = [f"{list_name}.{index}" if list_name else str(index) for index in range(len(module))]
        held = {block: sum(name.startswith(f"{block}.") for name in names) for block in blocks}
        if sum(map(bool, held.values())) > 1:
            found.append((sum(held.values()), blocks))
            outer = (*outer, f"{list_name}." if list_name else "")
    return [blocks for _, blocks in sorted(found, key=lambda entry: -entry[0])]


class Stop(Exception):
    """Ends a forward pass early: what was wanted has been seen. Raised by hooks."""


def run_until(block: nn.Module, call: Call, hooks: dict[str, Callable]) -> None:
    """Run ``block`` with pre-forward hooks ``(module, args, kwargs)`` by module name; one may raise ``Stop``."""
    with hooked(hooks, block), suppress(Stop):
        call.run(block)


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
    # Weak: a layer that is replaced meanwhile goes, and its float weight with it.
    training = WeakKeyDictionary({module: module.training for module in model.modules()})
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def real_logits(model: nn.Module, call: Call, *, otherwise: str) -> Tensor:
    """(..., n_classes): of the tokens of ``call`` that are no padding.

    Raises:
        TypeError: the model gives none; ``otherwise`` says what they are for, and the way out.
    """
    logits = getattr(call.run(model), "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"{type(model).__name__} gives no logits{otherwise}")
    return call.real_tokens(logits)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of ``model`` gets a gradient; those that did, do so again afterwards."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, was_required in required.items():
            parameter.requires_grad_(was_required)


def input_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """What a layer that is called so reads."""
    return args[0] if args else next(iter(kwargs.values()))


def moved(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors on ``device``, and those made in inference mode as ordinary ones.

    A list or dict in which nothing moves stays the same object: some blocks hand states on by writing into one. A
    cache of keys and values is copied: a block adds to it whenever it runs, and has no need of the others' entries.
    """
    if isinstance(value, Cache):
        return copy.deepcopy(value)
    if isinstance(value, Tensor):
        is_foreign = value.is_inference() and not torch.is_inference_mode_enabled()
        return (value.clone() if is_foreign else value).to(device)
    if isinstance(value, (tuple, list)):
        items = [moved(item, device) for item in value]
        if all(item is old for item, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        entries = {key: moved(item, device) for key, item in value.items()}
        return value if all(entries[key] is value[key] for key in value) else type(value)(entries)
    return value
