"""A forward pass that can be paused from within and resumed later, and what it is paused with. Knows no blocks.

Each pass is a greenlet: a call stack of its own in the same thread, of which one runs at a time. Hence torch's
settings of the thread (gradients, autocast, ...) are exchanged whenever a pass starts to run or stops.

Torch's own C++ functions leave pointers to their call stack in the thread while they run (one is the handler of
warnings). So a pass does not stop below one: the pointers would outlive the stack, and the next warning would crash.
"""

from __future__ import annotations

import contextvars
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

# Python functions that torch calls from C++, beside ``forward`` of an autograd function: overrides of its functions.
CALLED_BY_TORCH = {"__torch_function__", "__torch_dispatch__"}
# Of containers in containers that are looked through for tensors.
MAX_DEPTH = 3
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def autograd_forwards() -> frozenset[CodeType]:
    """The code of ``forward`` of every autograd function that is defined: what calls it is no frame of Python."""
    functions: list[Any] = [torch.autograd.Function]
    for function in functions:  # grows while it is gone through
        functions += function.__subclasses__()
    return _forwards_of(tuple(functions[1:]))


@lru_cache(maxsize=1)
def _forwards_of(functions: tuple[Any, ...]) -> frozenset[CodeType]:
    codes = (getattr(inspect.unwrap(function.forward), "__code__", None) for function in functions)
    return frozenset(code for code in codes if code is not None)


@dataclass(frozen=True)
class TorchSettings:
    """The settings of a thread that a forward pass may change while it runs. ``autocast``: enabled and dtype."""

    is_grad_enabled: bool
    is_inference: bool
    autocast: tuple[tuple[bool, torch.dtype], ...]
    is_autocast_cached: bool
    function_modes: tuple[Any, ...]

    @classmethod
    def now(cls) -> TorchSettings:
        """Those of this thread."""
        return cls(
            is_grad_enabled=torch.is_grad_enabled(),
            is_inference=torch.is_inference_mode_enabled(),
            autocast=tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in AUTOCAST_DEVICES),
            is_autocast_cached=torch.is_autocast_cache_enabled(),
            function_modes=tuple(_get_current_function_mode_stack()),
        )

    def restore(self) -> None:
        """Set all but the inference mode, which :class:`Pass` enters and leaves."""
        torch.set_grad_enabled(self.is_grad_enabled)
        for device, (is_enabled, dtype) in zip(AUTOCAST_DEVICES, self.autocast, strict=True):
            torch.set_autocast_enabled(device, is_enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.is_autocast_cached)
        # Casts of weights that autocast keeps; they may be changed before the pass runs again.
        torch.clear_autocast_cache()
        if tuple(_get_current_function_mode_stack()) != self.function_modes:
            for _ in _get_current_function_mode_stack():
                _pop_mode()
            for mode in self.function_modes:
                _push_mode(mode)


class Pass(greenlet):
    """A computation that stops at :meth:`pause` and continues with :meth:`resume`; ``dead`` once it has ended.

    It starts with torch's settings and the context variables of where it was made. What it raises is raised by
    :meth:`resume`.
    """

    def __init__(self, computation: Callable[[], Any]) -> None:
        super().__init__()
        self.computation = computation
        self.settings = TorchSettings.now()
        self.gr_context = contextvars.copy_context()

    def run(self, *_: Any) -> Any:
        """Called by the first :meth:`resume`."""
        return self.computation()

    def resume(self, value: Any = None) -> Any:
        """Run until the next :meth:`pause`, which returned ``value`` inside; what is given there, or the result."""
        with self._exchanged_settings():
            return self.switch(value)

    def close(self) -> None:
        """End a pass that is paused, by an exception where it stands."""
        if self:  # started, and not ended
            with self._exchanged_settings():
                self.throw()

    @staticmethod
    def current() -> Pass | None:
        """The pass that runs at the moment."""
        running = getcurrent()
        return running if isinstance(running, Pass) else None

    def pause(self, value: Any) -> Any:
        """Give ``value`` to the caller of :meth:`resume`, from within; returns what the next one is given.

        Raises:
            RuntimeError: not :attr:`can_pause`.
        """
        if not self.can_pause:
            raise RuntimeError(
                "cannot calibrate block by block: this model calls a block from within a function of torch (a "
                "reentrant checkpoint, an autograd function, or a tensor class of its own), where a forward pass "
                "cannot wait. Switch that off (model.gradient_checkpointing_disable(), model.eval()), or quantize it "
                "without calibration."
            )
        return self.parent.switch(value)

    @property
    def can_pause(self) -> bool:
        """Whether no C++ function of torch called what runs now, in the pass itself; asked from within."""
        forwards = autograd_forwards()
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code.co_name in CALLED_BY_TORCH or frame.f_code in forwards:
                return False
            frame = frame.f_back
        return True

    @contextmanager
    def _exchanged_settings(self) -> Iterator[None]:
        outer = TorchSettings.now()
        try:
            # Torch has no setter for this mode. Leaving the region restores what was set where it was entered,
            # whatever regions were entered or left in between.
            with torch.inference_mode(self.settings.is_inference):
                self.settings.restore()
                try:
                    yield
                finally:
                    self.settings = TorchSettings.now()
        finally:
            outer.restore()


def bytes_in_frames(*, beside: Iterable[Any] = ()) -> int:
    """Bytes of the tensors that are named in the frames of what runs now, or are in a container that is.

    What stands between two calls without a name (``f(x) + g(x)``) is not seen.

    Args:
        beside: tensors, and containers of them, whose memory does not count.
    """
    found: dict[int, int] = {}
    # Not of this one: a frame that is among its own names stays in memory, and so do those below it.
    frame: FrameType | None = getattr(inspect.currentframe(), "f_back", None)
    while frame is not None:
        found |= _storages_in(tuple(frame.f_locals.values()))
        frame = frame.f_back
    for address in _storages_in(tuple(beside)):
        found.pop(address, None)
    return sum(found.values())


def _storages_in(value: Any, depth: int = 0) -> dict[int, int]:
    """Address and bytes of the storages of the tensors in ``value``."""
    if isinstance(value, Tensor):
        with suppress(RuntimeError, NotImplementedError):  # a kind of tensor without one
            storage = value.untyped_storage()
            return {storage.data_ptr(): storage.nbytes()}
    found: dict[int, int] = {}
    if isinstance(value, (tuple, list, Mapping)) and depth < MAX_DEPTH:
        for each in value.values() if isinstance(value, Mapping) else value:
            found |= _storages_in(each, depth + 1)
    return found


@contextmanager
def replaced_forwards(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    """While this is open, each module's ``forward`` is the given function.

    An attribute of the instance takes precedence over the method of its class; accelerate wraps a forward in the same
    way. A forward pre-hook would not do: it cannot keep the module's own forward from running.
    """
    own = {module: vars(module)["forward"] for module in forwards if "forward" in vars(module)}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)
        for module, forward in own.items():
            vars(module)["forward"] = forward
