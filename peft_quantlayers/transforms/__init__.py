"""Transforms of a float model before it is quantized: it computes what it did, with weights that quantize better.

Each is a pure core, tensors in and tensors out, and a wiring that knows where in a model it fits. Imports calibration
and what lies below it; no adapters.
"""

from .awq import AWQScales
from .base import Transform
from .rotation import Rotation
from .smoothquant import SmoothQuant
from .transform_model import transform_model

__all__ = ["AWQScales", "Rotation", "SmoothQuant", "Transform", "transform_model"]
