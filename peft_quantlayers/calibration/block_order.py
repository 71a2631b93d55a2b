"""In which order a model runs its blocks: what has to hold before they are walked one by one. Changes nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .blocks import Call, Stop
from .model_passes import call_of


def order_of(
    model: nn.Module,
    lists: Sequence[Sequence[str]],
    calls: Sequence[Call],
    *,
    layers: Sequence[str] = (),
    progress: bool = False,
) -> list[str]:
    """Names of the blocks that every call runs once, in their order.

    Left out are blocks that no call reaches; and lists other than the first, of which a block runs more than once,
    inside another block, or in some of the calls only. The layers of these are visited in the whole model.

    Args:
        model: runs each of ``calls``.
        lists: names of blocks, list by list, the most important one first.
        calls: of the model.
        layers: names of those to visit.
        progress: show a progress bar.

    Raises:
        ValueError: the model does not run on the data; no call reaches any of the layers; blocks of the first list
            that is reached do not run exactly once, or differ between calls; a block changes its inputs in place;
            inputs hold NaN or Inf. Nothing was changed.
    """
    bar = tqdm(calls, desc="Checking the data", unit="batch", disable=not progress)
    blocks_of_all = [block for blocks in lists for block in blocks]
    first, *others = (_Trace.of(model, blocks_of_all, layers, call) for call in bar)
    if layers and not any(trace.reached for trace in (first, *others)):
        raise ValueError(
            f"the calibration data reaches none of the {len(layers)} layers, such as {layers[0]}. Give batches with "
            "the inputs that they read, or go without calibration. Nothing was changed."
        )
    reached = [list(blocks) for blocks in lists if set(blocks) & set(first.order)]
    looped = {blocks[0]: [block for block in blocks if first.order.count(block) > 1] for blocks in reached}
    if reached and looped[reached[0][0]]:
        repeated = [block for blocks in looped.values() for block in blocks]
        raise ValueError(
            f"cannot calibrate block by block: {repeated[:3]} do not run exactly once in a forward pass, but several "
            f"times. Quantize the model without calibration{_without(repeated, layers)}. Nothing was changed."
        )
    kept = [blocks for blocks in reached if not looped[blocks[0]] and not first.nested & set(blocks)]
    return _common_order(kept, [first, *others])


def _without(repeated: Sequence[str], layers: Sequence[str]) -> str:
    """The other way out, as the end of a sentence; empty if none of ``layers`` lies outside of these blocks."""
    skipped = list(dict.fromkeys(map(_parent, repeated)))
    if layers and all(layer.startswith(tuple(f"{parent}." for parent in skipped)) for layer in layers):
        return ""
    return f", or leave these blocks out with skip_modules={skipped}"


def _common_order(lists: list[list[str]], traces: Sequence[_Trace]) -> list[str]:
    """The order in which all calls run the blocks of ``lists``, less the lists in which the calls differ."""
    for blocks in lists[1:]:
        if len({frozenset(set(trace.order) & set(blocks)) for trace in traces}) > 1:
            lists = [each for each in lists if each is not blocks]
    members = {block for blocks in lists for block in blocks}
    order, *others = ([block for block in trace.order if block in members] for trace in traces)
    for other in others:
        if other != order:
            name = next(
                (a for a, b in zip(order, other, strict=False) if a != b), order[min(len(other), len(order) - 1)]
            )
            raise ValueError(
                "cannot calibrate block by block: which blocks run, or in which order, changes with the data, first "
                f"at {name}. Nothing was changed."
            )
    return order


@dataclass
class _Trace:
    """What one call of a model does with its blocks.

    Fields:
        order: names of the blocks, each time one runs.
        nested: those that run inside another one.
        reached: the layers that run.
        problem: why the call cannot be walked; empty if it can.
    """

    order: list[str] = field(default_factory=list)
    nested: set[str] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)
    problem: str = ""
    _running: list[str] = field(default_factory=list)
    _seen: list[tuple[Any, int]] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, blocks: Sequence[str], layers: Sequence[str], call: Call) -> _Trace:
        """Run the model up to its output embeddings. Raises as :func:`order_of`."""
        trace = cls()
        with ExitStack() as stack:
            for name in blocks:
                block = model.get_submodule(name)
                stack.callback(block.register_forward_pre_hook(trace._before(name), with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(trace._after(name)).remove)
            for name in layers:
                stack.callback(model.get_submodule(name).register_forward_pre_hook(trace._reaches(name)).remove)
            if isinstance(head := _output_embeddings(model), nn.Module):
                stack.callback(head.register_forward_pre_hook(_stop).remove)
            with suppress(Stop):
                _run(model, call, lambda: bool(layers) and len(trace.reached) == len(layers))
        if trace.problem:
            raise ValueError(f"{trace.problem} Nothing was changed.")
        return trace

    def _reaches(self, name: str) -> Callable:
        return lambda module, args: self.reached.add(name)  # gives None: the inputs stay as they are

    def _before(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = call_of(args, kwargs).hidden
            if hidden.is_floating_point() and not torch.isfinite(hidden).all():
                self.problem = (
                    f"the inputs of {name} hold NaN or Inf on the calibration data: the model is broken, or overflows "
                    f"in {hidden.dtype}."
                )
                raise Stop
            self.order.append(name)
            if self._running:
                self.nested.add(name)
            else:
                self._seen[:] = _versions((args, kwargs))
            self._running.append(name)

        return hook

    def _after(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            self._running.pop()
            if not self._running and any(_version(value) != version for value, version in self._seen):
                self.problem = (
                    f"cannot calibrate block by block: {name} changes its inputs in place, and would have to run on "
                    "them several times."
                )
                raise Stop

        return hook


def _run(model: nn.Module, call: Call, has_reached_all: Callable[[], bool]) -> None:
    """Run the model, whose own errors are told as what they are: the data lacks something that it needs.

    What fails after the last layer (a classifier that looks for an end token) does not matter: the walk stops there.
    """
    try:
        call.run(model)
    except (Stop, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError, AssertionError) as error:
        if has_reached_all():
            return
        if type(model).forward is nn.Module.forward:
            parts = [name for name, part in model.named_children() if type(part).forward is not nn.Module.forward]
            raise ValueError(
                f"{type(model).__name__} has no forward of its own, only those of its parts {parts}: quantize the "
                "model without calibration, or a part of it with data for that part, for example "
                f"quantize_model(model.{parts[0] if parts else 'part'}, config, calibration=...). Nothing was changed."
            ) from None
        given = sorted(name for name, value in call.kwargs.items() if isinstance(value, Tensor))
        takes = [name for name in inspect.signature(model.forward).parameters if name not in ("args", "kwargs")]
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{type(model).__name__} does not run on the calibration data ({', '.join(given) or 'one tensor'}): "
            f"{reason[:500]} Give batches that its forward takes, as mappings to tensors, for example those of its "
            f"processor: Calibration(data=[{{'{takes[0] if takes else 'x'}': tensor, ...}}]); it takes {takes[:12]}. "
            "Nothing was changed."
        ) from error


def _stop(module: nn.Module, args: tuple) -> None:
    raise Stop


def _parent(block: str) -> str:
    """Name of the list that a block is in."""
    return block.rpartition(".")[0]


def _output_embeddings(model: nn.Module) -> Any:
    """A transformers model's head, None for others. What it computes is not needed, and large."""
    get = getattr(model, "get_output_embeddings", None)
    return None if get is None else get()


def _version(value: Any) -> int:
    """What tells whether a tensor or list was changed: torch's version, or the length."""
    return len(value) if isinstance(value, list) else value._version


def _versions(value: Any) -> list[tuple[Any, int]]:
    """Each tensor and list in ``value`` with its version."""
    if isinstance(value, Tensor):
        return [] if value.is_inference() else [(value, _version(value))]
    if isinstance(value, dict):
        return _versions(tuple(value.values()))
    if isinstance(value, (tuple, list)):
        inside = [found for item in value for found in _versions(item)]
        return [(value, _version(value)), *inside] if isinstance(value, list) else inside
    return []
