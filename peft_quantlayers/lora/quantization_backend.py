"""How PEFT's generic tuners (OFT, VeRA, MiSS, ...) read and write the weight of a quantized layer.

May import layers and PEFT's public classes.
"""

from typing import Any, cast

from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from ..layers import QuantizedLinear


class QuantizedLinearBackend(QuantizationBackend):
    """PEFT's view of a :class:`QuantizedLinear`: its name in a model's status, and a weight that can be merged into.

    Without it PEFT takes the layer for the ``nn.Linear`` that it is, with the same numbers.
    """

    layer_type = "linear"
    supports_merge = True

    def __init__(self, base_layer: QuantizedLinear) -> None:
        self.backend_name = f"quantlayers-{base_layer.spec.method}"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """The dense weight, (out_features, in_features), in the layer's ``compute_dtype``; a new tensor."""
        if isinstance(base_layer, QuantizedLinear):
            return base_layer.dequantize()
        return cast(nn.Linear, base_layer).weight.data.clone()  # merged into a dense layer

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Quantize ``weight_data`` into the layer under ``peft_layer``."""
        peft_layer.get_base_layer().weight.data = weight_data
