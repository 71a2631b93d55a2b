"""Parts of a model shared out over processes, which read and write files only: the bytes are those of one process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path

import torch

from ..integrations.float_checkpoint import FloatCheckpoint
from ..methods import QuantConfig
from .checkpoint_parts import PartsOfModel
from .work_folder import WorkFolder

_own: tuple[PartsOfModel, WorkFolder] | None = None
"""Of a process that makes parts."""


def made_in_processes(
    parts: PartsOfModel, work: WorkFolder, numbers: Sequence[int], *, n_processes: int
) -> Iterator[int]:
    """Make the parts ``numbers``, and give each as soon as it is finished.

    Ctrl-C reaches this process alone, also where a terminal sends it to all of them. Whatever ends this process or
    this call ends those that it started, in the middle of a part too.

    Raises:
        ValueError: a layer that cannot be quantized.
        RuntimeError: a process was killed, as the system does where memory runs out. Finished parts are kept.
    """
    n_threads = max(1, torch.get_num_threads() // n_processes)
    settings = (parts.checkpoint.folder, parts.config, parts.device, parts.part_bytes, work.folder, n_threads)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(n_processes, multiprocessing.get_context("spawn"), _begin, settings)
    try:
        with interrupts_held_back():  # processes are started here, and hold them back for good
            made = {pool.submit(_make, number): number for number in numbers}
        for each in as_completed(made):
            each.result()
            yield made[each]
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that quantized was killed: there may be too little memory for so many. Finished parts are "
            "kept; call again with fewer processes."
        ) from error
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits until this is closed; in processes that are started meanwhile, for ever."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # whose start would take the signal out of the mask again, up to Python 3.12
    # Processes inherit the mask of this thread. The system may give a signal to another thread, so it is kept too.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    is_main, kept = threading.current_thread() is threading.main_thread(), []
    handler = signal.signal(signal.SIGINT, lambda number, _: kept.append(number)) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if kept:
            signal.raise_signal(signal.SIGINT)


def _begin(
    source: Path,
    config: QuantConfig,
    device: torch.device | str | None,
    part_bytes: int,
    folder: Path,
    n_threads: int,
) -> None:
    global _own
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(n_threads)
    parts = PartsOfModel(FloatCheckpoint(source), config, device=device, part_bytes=part_bytes)
    _own = parts, WorkFolder.of_another_process(folder)


def end_with_parent() -> None:
    """After the parent was killed no process is left to end this one, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "the pool has started this process"
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _make(number: int) -> None:
    assert _own is not None, "the pool has called _begin"
    parts, work = _own
    parts.make(work, number)
