"""The model's own forward on each batch, waiting wherever it calls a block.

What a model does between its blocks (scaling, added embeddings, a second stream) runs as the model wrote it, on the
outputs that the walk gives in the place of those of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from .blocks import Call
from .paused_pass import Pass, replaced_forwards


def call_of(args: tuple, kwargs: dict[str, Any]) -> Call:
    """A call of a block that is being made, with the autocast region that it is made in."""
    call = Call(args, kwargs)
    device = call.hidden.device.type
    if torch.is_autocast_enabled(device):
        return Call(args, kwargs, torch.get_autocast_dtype(device))
    return call


class ModelPasses:
    """A pass of ``model`` for each of ``calls``; close it in the end, by ``with``. Passes move from block to block.

    Args:
        model: whose forward runs.
        blocks: names of the modules to wait at, in the order in which each pass calls them.
        calls: of the model.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], calls: list[Call]) -> None:
        self.model, self.blocks = model, blocks
        self.masks = [call.masks for call in calls]
        self.passes = [Pass(partial(call.run, model)) for call in calls]
        self.outputs: list[Any] = [None] * len(calls)

    def __enter__(self) -> ModelPasses:
        return self

    def __exit__(self, *exception: object) -> None:
        with ExitStack() as stack:
            for each in self.passes:
                stack.callback(each.close)

    def arrive(self, block: str) -> list[Call]:
        """Let every pass run on until it calls ``block``; the calls, in the order of the passes.

        Raises:
            ValueError: a pass called another block, or came to its end.
        """
        calls: list[Call] = []
        with replaced_forwards({self.model.get_submodule(name): self._paused(name) for name in self.blocks}):
            for index, each in enumerate(self.passes):
                output, self.outputs[index] = self.outputs[index], None
                found = each.resume(output)
                name, call = ("its end", None) if each.dead else found
                if call is None or name != block:
                    raise ValueError(
                        f"cannot calibrate block by block: a forward pass came to {name} where it came to {block} "
                        "before anything was changed. Load the model again, and quantize it without calibration."
                    )
                calls.append(replace(call, masks=self.masks[index]))
        return calls

    def give(self, outputs: Iterable[Any]) -> None:
        """What the block where the passes wait returns in each of them, once they run on."""
        for index, output in enumerate(outputs):
            self.outputs[index] = output

    def _paused(self, name: str) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            current = Pass.current()
            assert current is not None, "only passes run while blocks are replaced"
            return current.pause((name, call_of(args, kwargs)))

        return forward
