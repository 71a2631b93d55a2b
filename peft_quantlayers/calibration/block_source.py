"""Where the walk gets its blocks from: what it needs of a source, and a model in memory as one.

A source knows which layers are in which block, runs the model around its blocks, and makes one block available at a
time. It does not know what is done with the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import nn

from .block_order import order_of
from .blocks import Call, device_of, evaluating, find_block_lists
from .layer_passes import LayerPasses
from .model_passes import ModelPasses
from .process_group import ALONE, Processes


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
        """Layers that are in no block, and those of blocks that no call reaches (known after :meth:`check`).

        The walk visits them last, in the whole model.
        """

    def layers(self, block: str) -> list[str]:
        """Names of the layers to visit in a block."""

    def ready(self) -> AbstractContextManager[None]:
        """Around all that the walk does: evaluation mode, and no autocast but the model's own."""

    def check(self, *, progress: bool = False) -> None:
        """Run the unchanged model; with a bar if ``progress`` and it takes long.

        Raises:
            ValueError: it cannot be walked block by block; names the block. Nothing was changed.
        """

    def passes(self) -> ModelPasses:
        """The model's forward on each batch of this process, waiting at its blocks; a context manager."""

    def layer_passes(self, module: nn.Module, calls: list[Call]) -> LayerPasses:
        """Passes through ``module``, a block or the whole model, for the calls that this process has of it."""

    def opened(self, block: str) -> AbstractContextManager[nn.Module]:
        """The block, where it is to be run, made available and released in the end.

        It is the module of that name in the model that visitors change, whether the rest of that is in memory or not.
        """

    def home(self, block: str) -> torch.device:
        """Where the model takes the outputs of a block."""

    def whole(self) -> tuple[nn.Module, list[Call]]:
        """The model and the calls of this process, for the layers in no block."""


class ModelBlocks:
    """A model that is in memory, as a :class:`BlockSource`.

    Args:
        model: any module.
        names: the layers to visit.
        calls: of the model, all with the same inputs that matter for which blocks run.
        device: where blocks run; None for where each is.
        processes: those that share the calls.
    """

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        calls: list[Call],
        *,
        device: torch.device | str | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.names, self.calls, self.device = model, names, calls, device
        self.processes = processes
        self.lists = find_block_lists(model, names)
        self.blocks: list[str] = []
        self.rest: list[str] = []
        self._layers: dict[str, list[str]] = {}
        self.set_blocks([block for blocks in self.lists for block in blocks])
        self._homes = {block: self._device_of(block) for block in self.blocks}

    def set_blocks(self, blocks: list[str]) -> None:
        """Walk ``blocks``, in this order; all other layers are the rest."""
        self.blocks = blocks
        self._layers = {block: [name for name in self.names if name.startswith(f"{block}.")] for block in blocks}
        in_blocks = {name for inside in self._layers.values() for name in inside}
        self.rest = [name for name in self.names if name not in in_blocks]

    def layers(self, block: str) -> list[str]:
        return self._layers[block]

    @contextmanager
    def ready(self) -> Iterator[None]:
        device = device_of(self.model, torch.device("cpu"))
        # Autocast would keep its casts of weights that change; a region of the model's own takes this over.
        with evaluating(self.model), torch.autocast(device.type, enabled=False, cache_enabled=False):
            yield

    def check(self, *, progress: bool = False) -> None:
        self.set_blocks(order_of(self.model, self.lists, self.calls, layers=self.names, progress=progress))

    def passes(self) -> ModelPasses:
        return ModelPasses(self.model, self.blocks, self.processes.own(self.calls))

    def layer_passes(self, module: nn.Module, calls: list[Call]) -> LayerPasses:
        return LayerPasses(module, calls, processes=self.processes, n_calls=len(self.calls))

    @contextmanager
    def opened(self, block: str) -> Iterator[nn.Module]:
        module = self.model.get_submodule(block)
        module.to(self.device or self.home(block))
        yield module
        module.to(self.home(block))

    def home(self, block: str) -> torch.device:
        return self._homes[block]

    def whole(self) -> tuple[nn.Module, list[Call]]:
        return self.model, self.processes.own(self.calls)

    def _device_of(self, block: str) -> torch.device:
        return device_of(self.model.get_submodule(block), device_of(self.model, torch.device("cpu")))
