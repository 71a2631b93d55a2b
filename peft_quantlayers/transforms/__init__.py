"""Transforms of a float model before it is quantized: it computes what it did, with weights that quantize better.

Each is a pure core, tensors in and tensors out, and a wiring that knows where in a model it fits. Imports calibration
and what lies below it; no adapters.
"""

from .awq import AWQScales
from .permutation import Permutation
from .rotation import Rotation
from .smoothquant import SmoothQuant
from .transform_base import Transform
from .transform_model import transform_model

TRANSFORMS: dict[str, type[Transform]] = {each.name: each for each in (AWQScales, Permutation, Rotation, SmoothQuant)}
"""All transforms, by the names in records."""

__all__ = ["TRANSFORMS", "AWQScales", "Permutation", "Rotation", "SmoothQuant", "Transform", "transform_model"]
