"""Calibration: what a model reads while it is quantized or merged, and the walk that measures each layer's inputs."""

from .calibration_data import Calibration
from .quantize_calibrated import LayerResult, quantize_calibrated
from .sampled_data import sample_calibration_data
from .statistics import InputStatistics
from .walk import BlockWork, InputGroup, Visitor, walk

__all__ = [
    "BlockWork",
    "Calibration",
    "InputGroup",
    "InputStatistics",
    "LayerResult",
    "Visitor",
    "quantize_calibrated",
    "sample_calibration_data",
    "walk",
]
