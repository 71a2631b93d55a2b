"""Products of bfloat16 inputs that are computed in float32 are those of float32 inputs, rounded, to the bit."""

import pytest
import torch
from implementations import COMPILED
from torch import Tensor, nn

import peft_quantlayers as pql
from quantlayers_kernels import native

# By hand: only these two methods have compiled products, and each kind of layout of theirs is another kernel.
CONFIGS = {
    "HQQ 4-bit": pql.HQQConfig(nbits=4, group_size=64),
    "HQQ 3-bit, ragged": pql.HQQConfig(nbits=3, group_size=24),
    "HQQ 2-bit, rows": pql.HQQConfig(nbits=2, group_size=None),
    "AQLM": pql.AQLMConfig(rounds=0, beam=1),
}


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def layers(request) -> dict[torch.dtype, nn.Module]:
    """The same layer for each dtype."""
    torch.manual_seed(0)
    weight = torch.randn(37, 192)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        linear = nn.Linear(192, 37)
        linear.weight.data, linear.bias.data = weight.clone(), torch.arange(37.0)
        model = pql.quantize_model(nn.Sequential(linear), CONFIGS[request.param], progress=False).eval()
        found[dtype] = model[0]
        model[0].compute_dtype = dtype
    return found


@pytest.fixture(autouse=True)
def _in_float32(monkeypatch) -> None:
    """Not by an extension of the CPU."""
    monkeypatch.setattr(native, "is_float32_chosen", lambda: True)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Any NaN is as good as another one."""
    is_nan = left.isnan()
    return torch.equal(is_nan, right.isnan()) and torch.equal(
        left.view(torch.int16)[~is_nan], right.view(torch.int16)[~is_nan]
    )


@pytest.mark.parametrize("kernels", COMPILED, indirect=True)
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("shape", [(192,), (1, 192), (1, 3, 192), (16, 192)], ids=str)
@torch.no_grad()
def test_a_product_is_that_of_float32_rounded(shape, bits, layers, kernels):
    x = (10 * torch.randn(shape)).bfloat16()
    for layer in layers.values():
        if bits is not None and layer.spec.method == "aqlm":
            pytest.skip("AQLM layers round no inputs")
        pql.set_activation_bits(layer, bits)
        layer.__dict__.pop("_direct_product", None)  # of other kernels
    y, expected = layers[torch.bfloat16](x), layers[torch.float32](x.float())
    assert y.dtype == torch.bfloat16
    assert y.shape == (*shape[:-1], 37)
    assert same_bits(y, expected.bfloat16())
    # A copy that does not lie in one piece, and the way without a prepared product.
    spread = x.repeat_interleave(2, -1)[..., ::2]
    assert same_bits(layers[torch.bfloat16](spread), y)
    if bits is None:
        with torch.enable_grad():
            assert same_bits(layers[torch.bfloat16](x).detach(), y)


@pytest.mark.parametrize("kernels", COMPILED, indirect=True)
@torch.no_grad()
def test_numbers_without_a_neighbour_are_rounded_as_torch_rounds_them(layers, kernels):
    for value in (torch.inf, -torch.inf, torch.nan, -0.0, 3e38, 1e-40):
        x = torch.full((1, 192), value).bfloat16()
        for layer in layers.values():
            layer.__dict__.pop("_direct_product", None)
        assert same_bits(layers[torch.bfloat16](x), layers[torch.float32](x.float()).bfloat16())
