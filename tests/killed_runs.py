"""Runs that are killed at random file operations or moments, and called again until they are done."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


def folders_of_killed_runs(
    run: Callable[[Path], None], parent: Path, n_kills: int, *, seed: int, seconds: float | None = None
) -> list[Path]:
    """Folders that ``run(folder)`` wrote in spite of ``n_kills`` kills in all; each run is a forked process.

    ``seconds``: every second kill is not at a file operation, but at a random moment within so many seconds.
    """
    parent.mkdir()
    drawn = random.Random(seed)
    done = status = 0
    while n_kills > 0 or status != 0:
        by_time = seconds if n_kills % 2 else None
        kill_at = drawn.randint(1, 60) if n_kills > 0 and by_time is None else 0
        child = os.fork()
        if child == 0:
            _run_in_child(run, parent / str(done), kill_at)
        if by_time is not None and n_kills > 0:
            _kill_within(child, drawn.uniform(0, by_time))
        status = os.waitpid(child, 0)[1]
        assert status == 0 or os.WIFSIGNALED(status), f"the run itself failed, with status {status}"
        n_kills -= status != 0
        done += status == 0
    return [path for path in parent.iterdir() if path.is_dir()]


def _kill_within(child: int, seconds: float) -> None:
    """Kill ``child`` after ``seconds``, unless it has ended before; its status is left to be waited for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)


def _run_in_child(run: Callable[[Path], None], folder: Path, kill_at: int) -> None:
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in EVENTS and str(folder) in str(arguments[:2]):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(hook)
        run(folder)
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(1)
