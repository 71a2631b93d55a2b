"""Where the walk gets its blocks from: what it needs of a source, and a model in memory as one.

A source knows which layers are in which block, runs the model around its blocks, and makes one block available at a
time. It does not know what is done with the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .blocks import Call, Stop, device_of, evaluating, find_blocks, model_calls
from .model_passes import ModelPasses, call_of


class BlockSource(Protocol):
    """A model as the walk sees it.

    The walk enters :meth:`ready`, calls :meth:`check`, starts :meth:`passes` (twice where targets are wanted), and
    then for each block in turn: makes it available (:meth:`opened`), lets the passes come to it, visits its layers,
    and releases it. While a block is open no other has to be in memory: passes wait between blocks, and never run a
    block themselves. So a source that reads a folder of files loads a block when it is opened, and writes and drops it
    when it is left; only what stands around the blocks (embeddings, norms) stays.
    """

    @property
    def blocks(self) -> Sequence[str]:
        """Names of the blocks, in the order in which they run (known after :meth:`check`)."""

    @property
    def rest(self) -> Sequence[str]:
        """Layers that are in no block; the walk visits them last, in the whole model."""

    def layers(self, block: str) -> list[str]:
        """Names of the layers to visit in a block."""

    def ready(self) -> AbstractContextManager[None]:
        """Around all that the walk does: evaluation mode, and no autocast but the model's own."""

    def check(self) -> None:
        """Run the unchanged model.

        Raises:
            ValueError: it cannot be walked block by block; names the block. Nothing was changed.
        """

    def passes(self) -> ModelPasses:
        """The model's forward on each batch, waiting at its blocks; a context manager."""

    def opened(self, block: str) -> AbstractContextManager[nn.Module]:
        """The block, where it is to be run, made available and released in the end."""

    def home(self, block: str) -> torch.device:
        """Where the model takes the outputs of a block."""

    def whole(self) -> tuple[nn.Module, list[Call]]:
        """The model and its calls, for the layers in no block."""


class ModelBlocks:
    """A model that is in memory, as a :class:`BlockSource`.

    Args:
        model: any module.
        names: the layers to visit.
        batches: inputs of the model's forward.
        device: where blocks run; None for where each is.
    """

    def __init__(
        self, model: nn.Module, names: list[str], batches: list[Tensor], *, device: torch.device | str | None = None
    ) -> None:
        self.model, self.device = model, device
        self.calls = model_calls(model, batches)
        self.blocks = find_blocks(model, names)
        self._layers = {block: [name for name in names if name.startswith(f"{block}.")] for block in self.blocks}
        in_blocks = {name for inside in self._layers.values() for name in inside}
        self.rest = [name for name in names if name not in in_blocks]
        self._homes = {block: self._device_of(block) for block in self.blocks}

    def layers(self, block: str) -> list[str]:
        return self._layers[block]

    @contextmanager
    def ready(self) -> Iterator[None]:
        device = device_of(self.model, torch.device("cpu"))
        # Autocast would keep its casts of weights that change; a region of the model's own takes this over.
        with evaluating(self.model), torch.autocast(device.type, enabled=False, cache_enabled=False):
            yield

    def check(self) -> None:
        if not self.blocks:
            return
        order = self._order_of(self.calls[0], is_first=True)
        if sorted(order) != sorted(self.blocks):
            wrong = [name for name in self.blocks if order.count(name) != 1]
            raise ValueError(
                f"cannot calibrate block by block: {wrong[:3]} do not run exactly once in a forward pass. If this "
                "data does not reach them (a vision tower), leave their layers out with "
                f"skip_modules=[{_parent(wrong[0])!r}]. Nothing was changed."
            )
        self.blocks = order
        for call in self.calls[1:]:
            if (other := self._order_of(call)) != order:
                name = next(
                    (a for a, b in zip(order, other, strict=False) if a != b), order[min(len(other), len(order) - 1)]
                )
                raise ValueError(
                    "cannot calibrate block by block: which blocks run, or in which order, changes with the data, "
                    f"first at {name}. Nothing was changed."
                )

    def passes(self) -> ModelPasses:
        return ModelPasses(self.model, self.blocks, self.calls)

    @contextmanager
    def opened(self, block: str) -> Iterator[nn.Module]:
        module = self.model.get_submodule(block)
        module.to(self.device or self.home(block))
        yield module
        module.to(self.home(block))

    def home(self, block: str) -> torch.device:
        return self._homes[block]

    def whole(self) -> tuple[nn.Module, list[Call]]:
        return self.model, self.calls

    def _device_of(self, block: str) -> torch.device:
        return device_of(self.model.get_submodule(block), device_of(self.model, torch.device("cpu")))

    def _order_of(self, call: Call, *, is_first: bool = False) -> list[str]:
        """The blocks that run in a call of the model, in that order; the inputs of each are checked.

        Ends at the last block; the first pass goes on to the model's output embeddings, where a second call of a block
        would have shown.
        """
        order: list[str] = []
        seen: list[tuple[Any, int]] = []

        def before(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                hidden = call_of(args, kwargs).hidden
                if hidden.is_floating_point() and not torch.isfinite(hidden).all():
                    raise ValueError(
                        f"the inputs of {name} hold NaN or Inf on the calibration data: the model is broken, or "
                        f"overflows in {hidden.dtype}. Nothing was changed."
                    )
                order.append(name)
                if not is_first and len(order) == len(self.blocks):
                    raise Stop
                seen[:] = _versions((args, kwargs))

            return hook

        def after(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple, output: Any) -> None:
                if any(_version(value) != version for value, version in seen):
                    raise ValueError(
                        f"cannot calibrate block by block: {name} changes its inputs in place, and would have to run "
                        "on them several times. Nothing was changed."
                    )

            return hook

        def stop(module: nn.Module, args: tuple) -> None:
            raise Stop

        with ExitStack() as stack:
            for name in self.blocks:
                block = self.model.get_submodule(name)
                stack.callback(block.register_forward_pre_hook(before(name), with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(after(name)).remove)
            if isinstance(head := _output_embeddings(self.model), nn.Module):
                stack.callback(head.register_forward_pre_hook(stop).remove)
            with suppress(Stop):
                call.run(self.model)
        return order


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
