"""Calibration: what a model reads while it is quantized or merged, and the walk that shows each layer its inputs."""

from .data import Calibration
from .quantize_calibrated import LayerResult, quantize_calibrated
from .walk import BlockWork, Visitor, walk

__all__ = ["BlockWork", "Calibration", "LayerResult", "Visitor", "quantize_calibrated", "walk"]
