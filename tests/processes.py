"""A test in several processes that send each other tensors over gloo.

The test calls ``run_file(__file__)``, and the file ends with ``if __name__ == "__main__": in_processes(function)``. A
process of its own forks before torch has any threads; spawning would import everything once a rank.
"""

import faulthandler
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from programs import run_program

WORLD_SIZE = 2
TIMEOUT = 150  # seconds

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"
)


def run_file(file: str, *arguments: Any) -> None:
    """Run ``file`` as a program; fails if one of its processes does."""
    done = run_program(file, *arguments, timeout=TIMEOUT + 30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same") == WORLD_SIZE  # two processes may write into one line


def in_processes(function: Callable[..., None]) -> None:
    """Call ``function(rank, *arguments of the program)`` in each process, with its group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_run, args=(port, function, sys.argv[1:]), nprocs=WORLD_SIZE, start_method="fork")


def _run(rank: int, port: int, function: Callable[..., None], arguments: list[str]) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)  # a rank that waits for another one would wait for ever
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD_SIZE),
    }
    dist.init_process_group("gloo")
    try:
        function(rank, *arguments)
        print("same", flush=True)
    finally:
        dist.destroy_process_group()
