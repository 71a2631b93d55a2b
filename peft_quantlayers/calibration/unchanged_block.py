"""A block as it was before the walk changed it, and the passes of the unchanged model through it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import hidden_of, moved
from .layer_passes import LayerPasses
from .model_passes import ModelPasses


class UnchangedBlock:
    """Made before anything in the block is changed; close it in the end, by ``with``.

    Args:
        block: the block.
        name: its name in the model.
        passes: of the unchanged model, which have come to the block before it.
        home: where they take its outputs.
        runs_beside: keep a copy of the block, so that :attr:`beside` gives what its layers read. Otherwise the block
            runs now, and only its outputs are kept.

    Attributes:
        beside: passes through the copy; None without one.

    Raises:
        ValueError: the block cannot be copied.
    """

    def __init__(
        self, block: nn.Module, name: str, passes: ModelPasses, home: torch.device, *, runs_beside: bool
    ) -> None:
        self.passes, self.home = passes, home
        calls = passes.arrive(name)
        self.beside = LayerPasses(_copy_of(block, name), calls) if runs_beside else None
        self._outputs = [] if runs_beside else self._moved(call.run(block) for call in calls)

    def __enter__(self) -> UnchangedBlock:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.beside is not None:
            self.beside.close()

    def finish(self) -> list[Tensor]:
        """Let the passes have the outputs of the block; its hidden states, (..., features) for each call."""
        if self.beside is not None:
            self._outputs = self._moved(self.beside.outputs())
            self.beside = None  # and with it the copy goes
        self.passes.give(self._outputs)
        return [hidden_of(output) for output in self._outputs]

    def _moved(self, outputs: Iterable[Any]) -> list[Any]:
        return [moved(output, self.home) for output in outputs]


def _copy_of(block: nn.Module, name: str) -> nn.Module:
    try:
        return copy.deepcopy(block)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name}: with asymmetric targets the unchanged block runs beside the one that is changed, and it cannot "
            f"be copied ({error}). Use asymmetric_targets=False."
        ) from None
