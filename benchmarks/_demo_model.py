"""The small real model of the examples, and llama.cpp's converter, for benchmarks."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from demo_model import demo_model_folder
from llama_cpp_converter import ensure_converter

__all__ = ["demo_model_folder", "ensure_converter"]
