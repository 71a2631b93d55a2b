"""Which of some forms of a Triton kernel is the fastest on a GPU: measured once, and kept in a folder.

The form of a kernel is how its work is laid out: rows of a program, inputs of a step, warps, steps in flight. Which is
best depends on the GPU and on the weight's shape. A product that comes for the first time on a machine is run in each
form, on its own arguments, and the fastest one is used from then on, in later processes too. Forms differ in the order
of their sums, and so in the last bits of their results; ``PEFT_QUANTLAYERS_GPU_TUNING=off`` in the environment takes
the first form, which is the same on all machines, and measures nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .cache_folder import cache_folder

logger = logging.getLogger(__name__)

SWITCH = "PEFT_QUANTLAYERS_GPU_TUNING"
# Raise it when a kernel changes: what was measured before is measured again.
KERNELS_VERSION = 2
WARMUPS, REPEATS = 2, 9
# Another form than the first must save this part of its time, or it is within the noise.
MIN_GAIN = 0.05
# Written before each run, or twice the last-level cache, so that no weight is in it: decoding a token reads each
# weight once. So often that the host gets ahead of the GPU, and launching is not measured; more often where it was.
FLUSHED_BYTES, FLUSHES, MAX_FLUSHES = 1 << 27, 8, 64
# What ends the process's work on a GPU, so that no other form could run either.
_FATAL: tuple[type[Exception], ...] = (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()

FormT = TypeVar("FormT", bound=tuple[Any, ...])  # a NamedTuple of integers

# By device, kernel and facts.
_chosen: dict[tuple[Any, ...], Any] = {}


def fastest(
    kernel: str, facts: tuple[Any, ...], forms: Sequence[FormT], product: Callable[[FormT], Tensor], *, like: Tensor
) -> FormT:
    """The form of ``forms`` to run a kernel in.

    Args:
        kernel: its name.
        facts: all that the best form may depend on: shapes, dtypes, the weight's scheme.
        forms: the first is taken unless another one was measured to be faster. One that cannot be launched on this
            GPU (too little shared memory) is passed over.
        product: runs the kernel in a form, with the arguments at hand; its results are thrown away.
        like: a tensor on the device.
    """
    if torch.are_deterministic_algorithms_enabled():
        return forms[0]
    device = like.device
    found: FormT | None = _chosen.get((device, kernel, facts))
    if found is None and is_on() and _can_measure(device):
        try:
            found = _stored_or_measured(kernel, facts, forms, product, device)
        except _FATAL:
            raise
        except Exception as error:  # a product never fails for want of the fastest form
            logger.warning("%s is not measured (%s: %s)", kernel, type(error).__name__, error)
            found = forms[0]
        _chosen[device, kernel, facts] = found
    return forms[0] if found is None else found


def is_on() -> bool:
    """Whether forms are measured. Raises ValueError where the environment says neither on nor off."""
    said = os.environ.get(SWITCH, "").lower() or "on"
    if said not in ("on", "off"):
        raise ValueError(f"{SWITCH}={said!r} is unknown. Choose on or off.")
    return said == "on"


def chosen() -> dict[str, dict[str, int]]:
    """The form of each product that this process has measured or read."""
    return {_key(kernel, facts): form._asdict() for (_, kernel, facts), form in _chosen.items()}


def folder() -> Path:
    """Where it is kept, a file for each product: so processes need not wait for each other."""
    return cache_folder() / "gpu_tuning"


def _can_measure(device: torch.device) -> bool:
    """Not while a CUDA graph is recorded, nor in Triton's interpreter."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _stored_or_measured(
    kernel: str,
    facts: tuple[Any, ...],
    forms: Sequence[FormT],
    product: Callable[[FormT], Tensor],
    device: torch.device,
) -> FormT:
    machine, key = _machine(device), _key(kernel, facts)
    if (stored := _read(machine, key, forms)) is not None:
        return stored
    _say_once(device)
    seconds: dict[FormT, float] = {}
    for form in forms:
        try:
            seconds[form] = _seconds(partial(product, form), device)
        except _FATAL:
            raise
        except Exception as error:  # of the compiler, the driver or the allocator: not in this form, here and now
            logger.info("%s in the form %s: %s: %s", key, tuple(form), type(error).__name__, error)
    if not seconds:
        return forms[0]  # which the caller runs, and so raises what is wrong; another process tries again
    best = min(seconds, key=seconds.__getitem__)
    if forms[0] in seconds and seconds[best] > (1 - MIN_GAIN) * seconds[forms[0]]:
        best = forms[0]
    logger.info("%s: %s", key, {tuple(form): f"{1e6 * each:.1f} us" for form, each in seconds.items()})
    return _keep(machine, key, best, forms)


def _key(kernel: str, facts: tuple[Any, ...]) -> str:
    return " ".join(map(str, (kernel, *facts)))


@cache
def _machine(device: torch.device) -> str:
    """All that the times depend on beside a kernel and its arguments."""
    import triton

    return f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}, kernels {KERNELS_VERSION}"


@cache
def _say_once(device: torch.device) -> None:
    logger.warning(
        "measuring how to run the kernels of quantized layers on %s, a second or so for each kind of layer. What is "
        "found is kept in %s; %s=off leaves it out.",
        torch.cuda.get_device_name(device),
        folder(),
        SWITCH,
    )


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """Median of one call, with its arguments read from memory; what it compiles is not counted."""
    n_flushes = FLUSHES
    while True:
        seconds, is_late = _timed(run, device, n_flushes)
        if not is_late or n_flushes == MAX_FLUSHES:
            return seconds
        n_flushes *= 2


def _timed(run: Callable[[], Tensor], device: torch.device, n_flushes: int) -> tuple[float, bool]:
    """:func:`_seconds`, and whether the GPU was ready for a call before it was launched."""
    times, is_late = [], False
    with torch.cuda.device(device):
        cache_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        flushed = torch.empty(max(FLUSHED_BYTES, 2 * cache_bytes), dtype=torch.int8, device=device)
        for repeat in range(WARMUPS + REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(n_flushes):
                flushed.zero_()
            start.record()
            run()
            end.record()
            if repeat >= WARMUPS:
                is_late |= start.query()
                times.append((start, end))
            torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in times) / 1e3, is_late


def _file(machine: str, key: str) -> Path:
    return folder() / f"{hashlib.sha256(f'{machine}: {key}'.encode()).hexdigest()[:24]}.json"


def _read(machine: str, key: str, forms: Sequence[FormT]) -> FormT | None:
    """What is kept; None where nothing is, or none of ``forms``."""
    file = _file(machine, key)
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s): this kernel is measured again.", file, error)
        return None
    stored = found.get("form") if isinstance(found, dict) and found.get("key") == key else None
    return next((form for form in forms if form._asdict() == stored), None)  # type: ignore[attr-defined]


def _keep(machine: str, key: str, best: FormT, forms: Sequence[FormT]) -> FormT:
    """Write ``best``, and return it; or what another process has written meanwhile, so that all run the same."""
    file = _file(machine, key)
    said = {"machine": machine, "key": key, "form": best._asdict()}  # type: ignore[attr-defined]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            written = Path(scratch, file.name)
            written.write_text(json.dumps(said, indent=1) + "\n")
            try:
                os.link(written, file)  # the first one wins
            except OSError:
                of_other = _read(machine, key, forms)
                if of_other is not None:
                    return of_other
                os.replace(written, file)  # over a damaged one, or where there are no links
    except OSError as error:
        logger.warning("%s cannot be written (%s): measured again in the next process.", file, error)
    return best
