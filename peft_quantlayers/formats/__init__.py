"""What quantized tensors mean: specs, values and file layouts. Ground floor: imports torch and the kernels only."""

from .quantized_weight import QuantizedWeight
from .spec import QuantSpec, TensorLayout

__all__ = ["QuantSpec", "QuantizedWeight", "TensorLayout"]
