"""The small real model of the examples, for benchmarks."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from demo_model import demo_model_folder

__all__ = ["demo_model_folder"]
