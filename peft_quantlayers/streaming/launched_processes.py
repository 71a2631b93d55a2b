"""Quantization in processes that a launcher has started: all share the work, and the first one writes the model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..calibration.process_group import Processes
from ..integrations.float_checkpoint import FloatCheckpoint, local_folder
from ..methods import QuantConfig
from .checkpoint_parts import PartsOfModel
from .gloo_processes import GlooProcesses
from .quantize_files import quantize_files
from .walking_processes import Walk, host_store, joined, left_at_the_end, walk_along
from .work_folder import WorkFolder


def quantize_in_group(
    source: str | Path,
    destination: str | Path,
    config: QuantConfig,
    *,
    calibration: Any = None,
    device: torch.device | str | None = None,
    own_device: torch.device | str | None = None,
    resume: bool = True,
    progress: bool = True,
) -> None:
    """As :func:`quantize_checkpoint`, called in every process of torch's default group; the files are the same.

    All return when the model is complete, or raise an error if one of them does.

    Args:
        source, destination, config, resume, progress: as there, the same in all processes.
        calibration: as there, if the others share it too; only the first process looks at the data.
        device: as it was given; an interrupted run goes on with the same only.
        own_device: where this process quantizes.

    Raises:
        ValueError: as there; another process failed. Finished parts are kept.
        LostProcessError: another process has ended in the middle of a calibration. Finished blocks are kept.
    """
    if dist.get_rank() == 0:
        _lead(
            source,
            destination,
            config,
            calibration=calibration,
            device=device,
            own_device=own_device,
            resume=resume,
            progress=progress,
        )
    else:
        _follow(local_folder(source), config, own_device)


def _lead(source: Any, destination: Any, config: QuantConfig, *, own_device: Any, **options: Any) -> None:
    def share(parts: PartsOfModel, work: WorkFolder, missing: Sequence[int]) -> list[int]:
        _sent((work.folder, parts.part_bytes, missing))
        own = list(missing[:: dist.get_world_size()])
        error = _made(parts, work, own)
        _all_made(error)
        return own

    @contextmanager
    def join(walk: Walk) -> Iterator[Processes]:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        store = host_store(host, dist.get_world_size())
        _sent((walk, host, store.port))
        with left_at_the_end(GlooProcesses(store, 0, dist.get_world_size(), device=own_device)) as together:
            yield together

    try:
        quantize_files(source, destination, config, share=share, join=join, own_device=own_device, **options)
    except Exception as error:
        with suppress(RuntimeError):  # of a process that has ended
            _sent(str(error) or type(error).__name__)
        raise
    _sent(None)


def _follow(folder: Path, config: QuantConfig, device: Any) -> None:
    """Make the parts that the first process gives, or walk with it, if there is work; and wait until it is done."""
    given = _sent()
    if isinstance(given, tuple) and isinstance(given[0], Walk):
        walk, host, port = given
        try:
            together = joined(host, port, dist.get_rank(), dist.get_world_size(), device)
            with left_at_the_end(together):
                walk_along(dataclasses.replace(walk, source=folder), together, device)
        except Exception:
            with suppress(RuntimeError):  # the first process has ended
                _sent()
            raise
        given = _sent()
    elif isinstance(given, tuple):
        work, part_bytes, missing = given
        error: Exception | None
        try:
            parts = PartsOfModel(FloatCheckpoint(folder), config, device=device, part_bytes=part_bytes)
            own = missing[dist.get_rank() :: dist.get_world_size()]
            error = _made(parts, WorkFolder.of_another_process(work), own)
        except Exception as raised:
            error = raised
        try:
            _all_made(error)
        finally:
            given = _sent()
    if given is not None:
        raise ValueError(given)


def _made(parts: PartsOfModel, work: WorkFolder, numbers: Sequence[int]) -> Exception | None:
    """Make parts; the error that ended it, which is told when all processes have come so far."""
    try:
        for number in numbers:
            parts.make(work, number)
    except Exception as error:
        return error
    return None


def _all_made(own: Exception | None) -> None:
    """Wait for all processes. Raises the own error, or a ValueError with that of another one."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if own is None else str(own) or type(own).__name__)
    if own is not None:
        raise own
    for rank, error in enumerate(errors):
        if error is not None:
            raise ValueError(f"process {rank} could not quantize: {error} Finished parts are kept.")


def _sent(message: Any = None) -> Any:
    """``message`` of the first process, in all of them."""
    box = [message]
    dist.broadcast_object_list(box, src=0)
    return box[0]
