"""Passes over one block that wait at a layer until it was changed, and go on from there.

Layers are changed one after the other, and each must see what those before it give by then. To begin anew at the
block's start for each would run most of the block several times over. On a CPU, where that is most of the time and
memory is there, a pass waits in a thread of its own instead; only one thread runs at a time. On a GPU nothing waits.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Call, Stop, device_of, input_of

# Passes that wait at a time, each with what the block has computed so far; and the threads of all of them together,
# since torch starts as many for each pass as it uses.
MAX_WAITING = 32
MAX_THREADS = 128


class Passes:
    """All calls of one block. Layers are asked for in the order in which they run; close it in the end."""

    def __init__(self, block: nn.Module, calls: list[Call]) -> None:
        self.block, self.calls = block, calls
        most = min(len(calls), MAX_WAITING, MAX_THREADS // torch.get_num_threads())
        self.n_waiting = most if device_of(block, torch.device("cpu")).type == "cpu" else 0
        self.waiting: dict[int, _Pass] = {}
        self.arrived: Tensor | None = None

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing waits any more; all calls begin anew."""
        for each in self.waiting.values():
            each.end()
        self.waiting.clear()

    def inputs(self, names: list[str]) -> Generator[Tensor]:
        """What the first of the layers ``names`` to run reads in each call; calls that reach none give nothing."""
        with self._paused(names):
            for index, call in enumerate(self.calls):
                found = self._input(index, call)
                if found is not None:
                    yield found

    def outputs(self) -> Iterator[Tensor]:
        """The block's output for each call, with the layers as they are now."""
        for index, call in enumerate(self.calls):
            waiting = self.waiting.get(index)
            yield call(self.block) if waiting is None else waiting.go_on().output
            self.waiting.pop(index, None)

    def _input(self, index: int, call: Call) -> Tensor | None:
        if index >= self.n_waiting:
            self.arrived = None
            with suppress(Stop):
                call(self.block)
            return self.arrived
        # One that has gone by the layer is of no use any more.
        waiting = self.waiting.get(index)
        if waiting is None or waiting.go_on().is_over:
            waiting = self.waiting[index] = _Pass(call, self.block)
            waiting.go_on()
        if waiting.is_over:
            del self.waiting[index]
        return waiting.arrived

    @contextmanager
    def _paused(self, names: list[str]) -> Iterator[None]:
        """While this is open, a pass that comes to one of ``names`` is held up there, once."""
        modules = {name: self.block.get_submodule(name) for name in names}
        # A forward of the instance's own goes before that of the class; other libraries wrap it in the same way.
        own = {name: vars(module).get("forward") for name, module in modules.items()}
        held: set[_Pass] = set()

        def paused(name: str, module: nn.Module, forward: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                current = threading.current_thread()
                x = input_of(args, kwargs)
                if not isinstance(current, _Pass):
                    self.arrived = x
                    raise Stop
                if current not in held:
                    held.add(current)
                    current.wait(x)
                # Another module may stand in its place by now.
                now = self.block.get_submodule(name)
                return forward(*args, **kwargs) if now is module else now(*args, **kwargs)

            return call

        try:
            for name, module in modules.items():
                vars(module)["forward"] = paused(name, module, module.forward)
            yield
        finally:
            for name, module in modules.items():
                vars(module).pop("forward", None)
                if own[name] is not None:
                    vars(module)["forward"] = own[name]


class _Pass(threading.Thread):
    """A call of a block in a thread that only runs while :meth:`go_on` waits for it."""

    def __init__(self, call: Call, block: nn.Module) -> None:
        super().__init__(daemon=True)
        self.call, self.block = call, block
        self.arrived: Tensor | None = None
        self.output: Any = None
        self.error: BaseException | None = None
        self.is_over = False
        self.is_ended = False
        self.turn: SimpleQueue[None] = SimpleQueue()
        self.done: SimpleQueue[None] = SimpleQueue()

    def go_on(self) -> _Pass:
        """Run until it waits again or is over. Raises what the block raises."""
        if self.is_alive():
            self.turn.put(None)
        else:
            self.start()
        self.done.get()
        if self.error is not None:
            raise self.error
        return self

    def end(self) -> None:
        """Leave the block where it waits."""
        if self.is_alive():
            self.is_ended = True
            self.turn.put(None)
            self.join()

    def wait(self, arrived: Tensor) -> None:
        """Called by the pass itself."""
        self.arrived = arrived
        self.done.put(None)
        self.turn.get()
        self.arrived = None
        if self.is_ended:
            raise Stop

    def run(self) -> None:
        try:
            with torch.no_grad():
                self.output = self.call(self.block)
        except Stop:
            pass
        except BaseException as error:  # raised again where it is waited for
            self.error = error
        self.is_over = True
        self.done.put(None)
