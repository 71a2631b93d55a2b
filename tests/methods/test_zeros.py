"""A weight of zeros, as fresh output layers have it."""

import pytest
from torch import nn

from peft_quantlayers import AQLMSpec, HQQSpec
from peft_quantlayers.layers import QuantizedLinear
from peft_quantlayers.methods.nf4 import NF4Spec

SPECS = {
    "hqq": HQQSpec(group_size=32),
    "aqlm": AQLMSpec(num_codebooks=1, nbits_per_codebook=3),
    "nf4": NF4Spec(block_size=32),
    "nf4 double": NF4Spec(block_size=32, double_quant=True),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_weight_of_zeros_stays_zero_and_is_no_damage(name):
    linear = nn.Linear(64, 64)
    nn.init.zeros_(linear.weight)
    layer = QuantizedLinear.from_linear(linear, SPECS[name])
    layer.quantized_weight.check(name)
    assert not layer.dequantize().any()
