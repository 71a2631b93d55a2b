"""Processes that walk through a model together: started here, or joined where a launcher has started them."""

from __future__ import annotations

import dataclasses
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..calibration import Calibration
from ..calibration.process_group import Processes
from ..integrations.float_checkpoint import FloatCheckpoint
from ..methods import QuantConfig
from .calibrated import quantize_calibrated_parts
from .checkpoint_parts import PartsOfModel
from .gloo_processes import GlooProcesses, LostProcessError
from .processes import end_with_parent, interrupts_held_back
from .work_folder import WorkFolder

_CONNECTING = timedelta(minutes=5)
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Walk:
    """What the other processes have to know of a walk; the data is sent to them once they are there.

    Fields:
        source: folder of the float model.
        config: the method, and overrides by name.
        blocks: names of the blocks.
        part_bytes: as in :class:`PartsOfModel`.
        work: the work folder, which the first process keeps.
    """

    source: Path
    config: QuantConfig
    blocks: Sequence[str]
    part_bytes: int
    work: Path

    @classmethod
    def of(cls, parts: PartsOfModel, work: WorkFolder) -> Walk:
        return cls(parts.checkpoint.folder, parts.config, list(parts.number_of), parts.part_bytes, work.folder)


# Has the others come, and gives what they are together.
Join = Callable[[Walk], AbstractContextManager[Processes]]


def walk_first(
    parts: PartsOfModel, work: WorkFolder, calibration: Calibration, batches: Any, join: Join, **options: Any
) -> None:
    """:func:`quantize_calibrated_parts` in the first process, and with it in those that ``join`` brings."""
    with join(Walk.of(parts, work)) as together:
        without_data = dataclasses.replace(calibration, data=(), tokenizer=None)
        together.of_first(lambda: (without_data, batches))
        quantize_calibrated_parts(parts, work, calibration, batches, together=together, **options)


def walk_along(walk: Walk, together: Processes, device: torch.device | str | None) -> None:
    """The same in all others. Raises what the first process raises, as far as it concerns this one."""
    given: Any = together.of_first(lambda: None)
    calibration, batches = given
    parts = PartsOfModel(
        FloatCheckpoint(walk.source), walk.config, device=device, blocks=walk.blocks, part_bytes=walk.part_bytes
    )
    work = WorkFolder.of_another_process(walk.work, keeps=False)
    quantize_calibrated_parts(parts, work, calibration, batches, progress=False, together=together)


@contextmanager
def left_at_the_end(together: GlooProcesses) -> Iterator[GlooProcesses]:
    """Leaves the others, after an error with what it says."""
    try:
        yield together
    except BaseException as error:
        together.close(error)
        raise
    together.close()


def host_store(host: str, size: int) -> dist.TCPStore:
    """A store of ``size`` processes at a free port of this machine, ``host`` to the others."""
    return dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False)


def joined(host: str, port: int, rank: int, size: int, device: torch.device | str | None) -> GlooProcesses:
    """This process among the others, once all have come."""
    store = dist.TCPStore(host, port, size, is_master=False, timeout=_CONNECTING)
    return GlooProcesses(store, rank, size, device=device)


@contextmanager
def started(walk: Walk, *, n_processes: int, device: torch.device | str | None) -> Iterator[Processes]:
    """This process and others that are started for it, each on a GPU of its own with the device "cuda".

    Ctrl-C reaches this process alone. Whatever ends it or this call ends the others.

    Raises:
        LostProcessError: one of them has ended in the middle.
    """
    store = host_store("127.0.0.1", n_processes)
    n_threads = torch.get_num_threads()
    own_threads = max(1, n_threads // n_processes)
    spawn = multiprocessing.get_context("spawn")
    others = [
        spawn.Process(
            target=_walk,
            args=(walk, store.port, rank, n_processes, device_of_rank(device, rank), own_threads),
            daemon=True,
        )
        for rank in range(1, n_processes)
    ]
    try:
        with interrupts_held_back():  # processes are started here, and hold them back for good
            for process in others:
                process.start()
        _wait_for(store, others)
        torch.set_num_threads(own_threads)
        with left_at_the_end(GlooProcesses(store, 0, n_processes, device=device)) as together:
            yield together
        for process in others:
            process.join()
    finally:
        torch.set_num_threads(n_threads)
        for process in others:
            if process.is_alive():
                process.terminate()


def device_of_rank(device: torch.device | str | None, rank: int) -> torch.device | str | None:
    """The GPU of a process where all GPUs are meant; otherwise ``device``."""
    return f"cuda:{rank % torch.cuda.device_count()}" if str(device) == "cuda" else device


def _wait_for(store: dist.TCPStore, others: Sequence[BaseProcess]) -> None:
    """Until all others are there. Raises LostProcessError where one of them has ended before."""
    missing = {_is_there(rank): process for rank, process in enumerate(others, start=1)}
    while missing:
        for key, process in list(missing.items()):
            if store.check([key]):
                del missing[key]
            elif not process.is_alive():
                raise LostProcessError(
                    "a process that was to share the calibration has ended before it began: there may be too little "
                    "memory for so many. Call again with fewer processes."
                )
        time.sleep(_POLL_SECONDS)


def _is_there(rank: int) -> str:
    return f"process {rank} is there"


def _walk(walk: Walk, port: int, rank: int, size: int, device: torch.device | str | None, n_threads: int) -> None:
    """What another process does."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(n_threads)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=False, timeout=_CONNECTING)
    store.set(_is_there(rank), "")
    try:
        with left_at_the_end(GlooProcesses(store, rank, size, device=device)) as together:
            walk_along(walk, together, device)
    except Exception:  # the first process has been told
        raise SystemExit(1) from None


def join_started(n_processes: int, device: torch.device | str | None) -> Join:
    """:func:`started`, as a :data:`Join`."""
    return partial(started, n_processes=n_processes, device=device)
