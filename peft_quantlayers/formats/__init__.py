"""What quantized tensors mean: specs, values and file layouts. Ground floor: imports torch and the kernels only."""

from .quant_spec import QuantSpec, TensorLayout
from .quantized_weight import QuantizedWeight

__all__ = ["QuantSpec", "QuantizedWeight", "TensorLayout"]
