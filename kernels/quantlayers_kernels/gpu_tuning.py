"""Which of some forms of a Triton kernel is the fastest on a GPU: measured once, and kept in a file.

The form of a kernel is how its work is laid out: rows of a program, inputs of a step, warps, steps in flight. Which is
best depends on the GPU and on the weight's shape. A product that comes for the first time on a machine is run in each
form, on its own arguments, and the fastest one is used from then on, in later processes too. Forms differ in the order
of their sums, and so in the last bits of their results; ``PEFT_QUANTLAYERS_GPU_TUNING=off`` in the environment takes
the first form, which is the same on all machines, and measures nothing.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SWITCH = "PEFT_QUANTLAYERS_GPU_TUNING"
FOLDER = "PEFT_QUANTLAYERS_CACHE"
FILE = "gpu_tuning.json"
# Raise it when a kernel changes: what was measured before is measured again.
KERNELS_VERSION = 1
WARMUPS, REPEATS = 2, 9
# Another form than the first must save this part of its time, or it is within the noise.
MIN_GAIN = 0.05
# Written before each run, so that no weight is in the level-2 cache: decoding a token reads each weight once. So often
# that the host gets ahead of the GPU meanwhile, and launching is not measured.
FLUSHED_BYTES, FLUSHES = 1 << 27, 8

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
    device = like.device
    found: FormT | None = _chosen.get((device, kernel, facts))
    if found is None and is_on() and _can_measure(device):
        found = _chosen[device, kernel, facts] = _stored_or_measured(kernel, facts, forms, product, device)
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


def file() -> Path:
    """Where it is kept."""
    return Path(os.environ.get(FOLDER, Path.home() / ".cache" / "peft_quantlayers")) / FILE


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
    stored = _form_of(_read().get(machine, {}).get(key), forms)
    if stored is not None:
        return stored
    _say_once(device)
    seconds: dict[FormT, float] = {}
    for form in forms:
        try:
            seconds[form] = _seconds(partial(product, form), device)
        except Exception as error:  # of the compiler, the driver or the allocator: not in this form, here and now
            logger.debug("%s in the form %s: %s", key, form, error)
    if not seconds:
        return forms[0]  # which the caller runs, and so raises what is wrong; another process tries again
    best = min(seconds, key=seconds.__getitem__)
    if forms[0] in seconds and seconds[best] > (1 - MIN_GAIN) * seconds[forms[0]]:
        best = forms[0]
    logger.info("%s: %s", key, {tuple(form): f"{1e6 * each:.1f} us" for form, each in seconds.items()})
    return _keep(machine, key, best, forms)


def _key(kernel: str, facts: tuple[Any, ...]) -> str:
    return " ".join(map(str, (kernel, *facts)))


def _form_of(stored: Any, forms: Sequence[FormT]) -> FormT | None:
    """The form that a file names; None where it names none of them."""
    return next((form for form in forms if form._asdict() == stored), None)  # type: ignore[attr-defined]


@cache
def _machine(device: torch.device) -> str:
    """All that the times depend on beside a kernel and its arguments."""
    return ", ".join((torch.cuda.get_device_name(device), f"triton {version('triton')}", f"kernels {KERNELS_VERSION}"))


@cache
def _say_once(device: torch.device) -> None:
    logger.warning(
        "measuring how to run the kernels of quantized layers on %s, a second or so for each kind of layer. What is "
        "found is kept in %s; %s=off leaves it out.",
        torch.cuda.get_device_name(device),
        file(),
        SWITCH,
    )


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """Median of one call, with its arguments read from memory; what it compiles is not counted."""
    times = []
    with torch.cuda.device(device):
        flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
        for repeat in range(WARMUPS + REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(FLUSHES):
                flushed.zero_()
            start.record()
            run()
            end.record()
            if repeat >= WARMUPS:
                times.append((start, end))
        torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in times) / 1e3


def _read() -> dict[str, dict[str, Any]]:
    """What is kept, by machine and key; nothing where there is no file, or it is none of ours."""
    try:
        found = json.loads(file().read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s): kernels are measured again.", file(), error)
        return {}
    is_ours = isinstance(found, dict) and all(isinstance(each, dict) for each in found.values())
    return found if is_ours else {}


def _keep(machine: str, key: str, best: FormT, forms: Sequence[FormT]) -> FormT:
    """Write ``best``, and return it; or what another process has written meanwhile, so that all run the same."""
    known = _read()
    of_other = _form_of(known.get(machine, {}).get(key), forms)
    if of_other is not None:
        return of_other
    known.setdefault(machine, {})[key] = best._asdict()  # type: ignore[attr-defined]
    try:
        file().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file().parent, prefix=FILE, delete=False) as written:
            written.write(json.dumps(known, indent=1) + "\n")
        os.replace(written.name, file())
    except OSError as error:
        logger.warning("%s cannot be written (%s): kernels are measured again in the next process.", file(), error)
    return best
