"""A weight of zeros, as fresh output layers have it."""

import pytest
from every_method import VARIANTS
from torch import nn

from peft_quantlayers.layers import QuantizedLinear


@pytest.mark.usefixtures("toy_method")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_weight_of_zeros_stays_zero_and_is_no_damage(name):
    linear = nn.Linear(64, 64)
    nn.init.zeros_(linear.weight)
    layer = QuantizedLinear.from_linear(linear, VARIANTS[name].spec_for(name))
    layer.quantized_weight.check(name)
    assert not layer.dequantize().any()
