"""Parts of a model shared out over processes, which read and write files only: the bytes are those of one process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from ..integrations.float_checkpoint import FloatCheckpoint
from ..methods import QuantConfig
from .parts import PartsOfModel
from .work_folder import WorkFolder

_own: tuple[PartsOfModel, WorkFolder] | None = None
"""Of a process that makes parts."""


def made_in_processes(
    parts: PartsOfModel, work: WorkFolder, numbers: Sequence[int], *, n_processes: int
) -> Iterator[int]:
    """Make the parts ``numbers``, and give each as soon as it is finished.

    Raises:
        ValueError: a layer that cannot be quantized.
        RuntimeError: a process was killed, as the system does where memory runs out. Finished parts are kept.
    """
    n_threads = max(1, torch.get_num_threads() // n_processes)
    settings = (parts.checkpoint.folder, parts.config, parts.device, parts.part_bytes, work.folder, n_threads)
    pool = ProcessPoolExecutor(n_processes, multiprocessing.get_context("spawn"), _begin, settings)
    try:
        made = {pool.submit(_make, number): number for number in numbers}
        for each in as_completed(made):
            each.result()
            yield made[each]
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that quantized was killed: there may be too little memory for so many. Finished parts are "
            "kept; call again with fewer processes."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(
    source: Path,
    config: QuantConfig,
    device: torch.device | str | None,
    part_bytes: int,
    folder: Path,
    n_threads: int,
) -> None:
    global _own
    torch.set_num_threads(n_threads)
    parts = PartsOfModel(FloatCheckpoint(source), config, device=device, part_bytes=part_bytes)
    _own = parts, WorkFolder.of_another_process(folder)


def _make(number: int) -> None:
    assert _own is not None, "the pool has called _begin"
    parts, work = _own
    parts.make(work, number)
