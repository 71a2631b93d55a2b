"""A weight of zeros, as fresh output layers have it."""

import pytest
from every_method import SPECS
from torch import nn

from peft_quantlayers.layers import QuantizedLinear


@pytest.mark.parametrize("name", SPECS)
def test_a_weight_of_zeros_stays_zero_and_is_no_damage(name):
    linear = nn.Linear(64, 64)
    nn.init.zeros_(linear.weight)
    layer = QuantizedLinear.from_linear(linear, SPECS[name])
    layer.quantized_weight.check(name)
    assert not layer.dequantize().any()
