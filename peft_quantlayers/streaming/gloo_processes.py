"""Processes that send each other results over gloo, each result once all have come to the same place."""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..calibration.process_group import Processes

T = TypeVar("T")

# For all to come, once each is known to run.
_JOINING = timedelta(minutes=10)
# A process may wait so long for what another one makes. One that has ended is noticed at once.
_WAITING = timedelta(days=30)
_POLL_SECONDS = 0.001
_FAILURE = "failure"


class LostProcessError(ConnectionError):
    """Another process has ended in the middle; the message says why, if that is known."""


class GlooProcesses(Processes):
    """This process and others; close it in the end, also after an error, so that the others do not wait for it.

    Args:
        store: of all of them.
        rank, size: as in :class:`Processes`.
        device: of this process, where tensors come to that are on the other's device in another process.
    """

    def __init__(self, store: dist.TCPStore, rank: int, size: int, *, device: torch.device | str | None) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._store = store
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, _JOINING)
        self._group.set_timeout(_WAITING)

    def close(self, failure: BaseException | None = None) -> None:
        """Leave. Others that wait for this process then end with the message of ``failure``."""
        if failure is not None and not isinstance(failure, LostProcessError):
            with suppress(RuntimeError):  # the process that holds the store has ended
                self._store.set(_FAILURE, str(failure) or type(failure).__name__)
        self._group = None  # which closes the connections

    def gathered(self, make: Callable[[], T]) -> list[T]:
        """As :meth:`Processes.gathered`. Raises LostProcessError where another process has ended."""
        own: Any
        try:
            own = make()
        except Exception as error:
            own = _Raised.of(error)
        sent = _Packed.of(own)
        with self._losses():
            messages = self._messages(sent.message)
        found: list[Any] = []
        for rank, message in enumerate(messages):
            here = sent if rank == self.rank else _Packed.to_receive(message)
            with self._losses():
                for tensor in here.tensors:
                    if tensor.numel():
                        self._group.broadcast(tensor.view(-1).view(torch.uint8), rank).wait()
            found.append(own if rank == self.rank else here.value(self.device))
        for each in found:
            if isinstance(each, _Raised):
                raise each.error
        return found

    def _messages(self, message: bytes) -> list[bytes]:
        """The messages of all processes."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        arrived = self._group.allgather(sizes, torch.tensor([len(message)]))
        while not arrived.is_completed():  # here they wait for each other, and Ctrl-C has to be heard
            time.sleep(_POLL_SECONDS)
        arrived.wait()
        n_bytes = max(int(size) for size in sizes)
        texts = [torch.zeros(n_bytes, dtype=torch.uint8) for _ in range(self.size)]
        own = torch.frombuffer(bytearray(message.ljust(n_bytes, b"\0")), dtype=torch.uint8)
        self._group.allgather(texts, own).wait()
        return [bytes(text[: int(size)].numpy()) for text, size in zip(texts, sizes, strict=True)]

    @contextmanager
    def _losses(self) -> Iterator[None]:
        """Says why a connection is closed."""
        try:
            yield
        except RuntimeError as error:
            reason = "It may have been killed, as the system does where memory runs out."
            with suppress(RuntimeError):
                if self._store.check([_FAILURE]):
                    reason = self._store.get(_FAILURE).decode()
            raise LostProcessError(
                f"a process that shares the calibration has ended. {reason} Finished blocks are kept; call the same "
                "again to go on, with any number of processes."
            ) from error


@dataclass(frozen=True)
class _Raised:
    """What ``make`` raised in one process."""

    error: Exception

    @classmethod
    def of(cls, error: Exception) -> _Raised:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # of a class that other processes cannot make
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return cls(error)


class _Packed:
    """A value taken apart: its tensors, on the CPU, and a message about the rest. Processes trust each other."""

    def __init__(self, message: bytes, tensors: list[Tensor]) -> None:
        self.message, self.tensors = message, tensors

    @classmethod
    def of(cls, value: Any) -> _Packed:
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(value)
        forms = [(tuple(tensor.shape), tensor.dtype, tensor.device.type == "cpu") for tensor in pickler.tensors]
        tensors = [tensor.to("cpu", copy=tensor.is_inference()).contiguous() for tensor in pickler.tensors]
        return cls(pickle.dumps((forms, file.getvalue())), tensors)

    @classmethod
    def to_receive(cls, message: bytes) -> _Packed:
        """With empty tensors, to be filled."""
        forms, _ = pickle.loads(message)
        return cls(message, [torch.empty(shape, dtype=dtype) for shape, dtype, _ in forms])

    def value(self, device: torch.device | str | None) -> Any:
        """The value, with tensors that were not on a CPU on ``device``."""
        forms, text = pickle.loads(self.message)
        places = [
            tensor if is_on_cpu or device is None else tensor.to(device)
            for tensor, (*_, is_on_cpu) in zip(self.tensors, forms, strict=True)
        ]
        return _Unpickler(io.BytesIO(text), places).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj.detach())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: Any) -> Tensor:
        return self.tensors[pid]
