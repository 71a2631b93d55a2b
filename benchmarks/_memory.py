"""Seconds and memory of a call; memory on Linux only."""

import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

MIB = 1 << 20


def resident_bytes(entry: str) -> int:
    """A line of /proc/self/status, in bytes: VmRSS for what is resident now, VmHWM for the most since the last reset.

    ``resource.getrusage`` is wrong in a child process: its maximum includes the parent's memory.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {entry}: memory is measured on Linux only.")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def in_own_process(*arguments: str) -> str:
    """The last line that this script prints when it is run with ``arguments``."""
    done = subprocess.run([sys.executable, sys.argv[0], *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} failed: {done.stderr}")
    return done.stdout.splitlines()[-1]


def peak_of_anonymous(call: Callable[[], object]) -> float:
    """MiB that memory other than mapped files rose during the call, as a thread sees it every 10 ms."""
    before, found, is_done = resident_bytes("RssAnon"), [0], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.01):
            found[0] = max(found[0], resident_bytes("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        is_done.set()
        watcher.join()
    return (max(found[0], resident_bytes("RssAnon")) - before) / MIB


def extra_memory_of(call: Callable[[], object]) -> dict[str, float]:
    """Seconds, and MiB that the resident set rose during the call.

    Free memory that the allocator still holds would hide a part of it, and is returned to the system first.
    """
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes("VmRSS")
    reset_peak()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "before_mib": before / MIB, "extra_peak_mib": (resident_bytes("VmHWM") - before) / MIB}
