"""Passes over one block that wait at a layer until it has changed, and continue from there.

Layers are changed one after the other, and each must see what those before it give by then. To start from the block's
beginning for each would run most of the block several times over. On a CPU, where that is most of the time and memory
is there, a pass waits instead: the first ones, as many as ``WAITING_BYTES`` hold. On a GPU nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.dense_stack import is_called_stack
from .blocks import Call, Stop, device_of, input_of
from .expert_inputs import SortedInput
from .paused_pass import Pass, bytes_in_frames, replaced_forwards
from .process_group import ALONE, Processes
from .statistics import PairedInput

# For what the block has computed so far in the passes that wait; where the unchanged block runs beside it, of each.
WAITING_BYTES = 1 << 29


class LayerPasses:
    """All calls of one block. Layers are asked for in the order in which they run; close it in the end.

    Args:
        block: the block.
        calls: those that run in this process.
        processes: those that share the calls in turns; each is given what layers read in all calls.
        n_calls: of all processes; by default the number of ``calls``.
    """

    def __init__(
        self, block: nn.Module, calls: list[Call], *, processes: Processes = ALONE, n_calls: int | None = None
    ) -> None:
        self.block, self.calls, self.processes = block, calls, processes
        self.n_calls = len(calls) if n_calls is None else n_calls
        is_on_cpu = device_of(block, torch.device("cpu")).type == "cpu"
        self.n_waiting = len(calls) if is_on_cpu else 0
        self.waiting: dict[int, Pass] = {}
        self.arrived: Any = None
        self._running: Call | None = None

    def __enter__(self) -> LayerPasses:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all passes that wait; every call starts from the block's beginning then."""
        with ExitStack() as stack:
            for each in self.waiting.values():
                stack.callback(each.close)
        self.waiting.clear()

    def inputs(self, names: list[str], *, beside: LayerPasses | None = None) -> Generator[PairedInput]:
        """What the first of the layers ``names`` to run reads in each call, without padding.

        Calls that reach none of them give nothing.

        Args:
            names: of layers that read the same.
            beside: passes of the unchanged block with the same batches, whose layers' inputs are given too.
        """
        with ExitStack() as stack:
            stack.enter_context(self._paused(names))
            if beside is not None:
                stack.enter_context(beside._paused(names))

            def read(number: int) -> PairedInput | None:
                index = number // self.processes.size
                call = self.calls[index]
                found = self._input(index, call)
                original = None if beside is None else beside._input(index, beside.calls[index])
                if found is None:
                    return None
                if original is not None and (original.shape != found.shape or not self._is_unrouted(names, found)):
                    original = None
                return PairedInput(call.real_tokens(found), None if original is None else call.real_tokens(original))

            yield from filter(None, self.processes.in_turns(self.n_calls, read))

    def _is_unrouted(self, names: list[str], x: Tensor) -> bool:
        """Whether ``x`` holds tokens in their own order: sequences, or nothing that a list of experts was given."""
        if x.dim() > 2:
            return True
        parents = {".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 1)}
        return not any(isinstance(self.block.get_submodule(parent), nn.ModuleList) for parent in parents)

    def sorted_inputs(self, name: str) -> Generator[SortedInput]:
        """What the stack of experts ``name`` reads in each call, without padding."""

        def read(number: int) -> SortedInput | None:
            index = number // self.processes.size
            found = self._input(index, self.calls[index])
            return None if found is None else SortedInput.of(self.calls[index], found)

        with self._paused([name]):
            yield from filter(None, self.processes.in_turns(self.n_calls, read))

    def outputs(self) -> Iterator[Any]:
        """All that the block returns for each call of this process, with the layers as they are now."""
        for index, call in enumerate(self.calls):
            waiting = self.waiting.get(index)
            yield call.run(self.block) if waiting is None else waiting.resume()
            self.waiting.pop(index, None)

    def _input(self, index: int, call: Call) -> Any:
        if index >= self.n_waiting:
            if index in self.waiting:  # there was room for it at an earlier layer
                self.waiting.pop(index).close()
            self.arrived = None
            with suppress(Stop):
                call.run(self.block)
            return self.arrived
        waiting, self._running = self.waiting.get(index), call
        try:
            found = None if waiting is None else waiting.resume()
            # One that has gone by the layer is of no use any more.
            if waiting is None or waiting.dead:
                waiting = self.waiting[index] = Pass(partial(call.run, self.block))
                found = waiting.resume()
        except Stop:  # at the layer, where it cannot wait
            del self.waiting[index]
            return self.arrived
        if waiting.dead:
            del self.waiting[index]
            return None
        return found

    def _limit_waiting(self) -> None:
        """Let as many passes wait as have room; asked by one that is about to wait, from within."""
        call = self._running
        assert call is not None
        beside = [*self.block.parameters(), *self.block.buffers(), call.args, call.kwargs]
        bytes_per_number = bytes_in_frames(beside=beside) / max(1, call.hidden.numel())
        held = 0.0
        for index, each in enumerate(self.calls[: self.n_waiting]):
            held += bytes_per_number * each.hidden.numel()
            if held > WAITING_BYTES:
                self.n_waiting = index
                break

    @contextmanager
    def _paused(self, names: list[str]) -> Iterator[None]:
        """While this is open, a pass that comes to one of ``names`` waits there, once."""
        modules = {name: self.block.get_submodule(name) for name in names}
        held: set[Pass] = set()

        def paused(name: str, module: nn.Module, own_forward: Callable) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                x, current = args if is_called_stack(module) else input_of(args, kwargs), Pass.current()
                if current is None or (current not in held and not current.can_pause):
                    self.arrived = x
                    raise Stop
                if current not in held:
                    if not held:
                        self._limit_waiting()
                    held.add(current)
                    current.pause(x)
                # Another module may stand in its place by now.
                now = self.block.get_submodule(name)
                return own_forward(*args, **kwargs) if now is module else now(*args, **kwargs)

            return forward

        with replaced_forwards({module: paused(name, module, module.forward) for name, module in modules.items()}):
            yield
