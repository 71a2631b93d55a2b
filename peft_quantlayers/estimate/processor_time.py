"""How long a computation takes, whatever else the machine does meanwhile."""

import time
from collections.abc import Callable
from typing import Any


def processor_seconds(call: Callable[..., object], *arguments: Any) -> float:
    """Seconds of the processor in this thread, which takes part in all that torch does on the CPU."""
    start = time.thread_time()
    call(*arguments)
    return time.thread_time() - start
