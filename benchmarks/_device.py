"""What a benchmark ran on: written into every result file."""

import peft
import torch
import transformers
from _processor import processor_name


def describe_device() -> dict[str, str | int]:
    """Name of the processor and, if there is one, the GPU; threads, versions."""
    return {
        "cpu": processor_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
