"""The short way of a token through a layer gives the long way's bits, and never those of a weight that was."""

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

from peft_quantlayers import AQLMSpec, HQQSpec
from peft_quantlayers.layers import QuantizedLinear
from peft_quantlayers.methods import get_method
from quantlayers_kernels import native

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the short way leads to a compiled kernel")

IN, OUT = 64, 24
SPECS = {  # By hand: the methods with a compiled kernel for a few tokens.
    "hqq4": HQQSpec(nbits=4, group_size=16),
    "hqq3-float32": HQQSpec(nbits=3, group_size=None, scale_dtype="float32"),
    "hqq2-bfloat16": HQQSpec(nbits=2, group_size=32, scale_dtype="bfloat16"),
    "aqlm": AQLMSpec(num_codebooks=2, nbits_per_codebook=4, rounds=1),
    "aqlm-int16": AQLMSpec(num_codebooks=1, nbits_per_codebook=9, rounds=1),
}
EACH_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def layer_of(spec, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    torch.manual_seed(0)
    return QuantizedLinear.from_linear(nn.Linear(IN, OUT, bias=bias, dtype=dtype), spec)


def the_long_way(layer: QuantizedLinear, x: Tensor) -> Tensor:
    return layer.forward_with(x, layer.quantized_weight, layer.bias)


@pytest.fixture
def only_short(monkeypatch):
    """Forbids the long way until it is called again with False."""
    long_way = QuantizedLinear.forward_with

    def forbid(is_forbidden: bool = True) -> None:
        def refuse(*args, **kwargs):
            raise AssertionError("the long way was gone")

        monkeypatch.setattr(QuantizedLinear, "forward_with", refuse if is_forbidden else long_way)

    return forbid


@EACH_SPEC
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@torch.no_grad()
def test_a_few_tokens_go_the_short_way_with_the_same_bits(spec, dtype, bias, only_short):
    layer = layer_of(spec, bias=bias, dtype=dtype)
    for shape in ((IN,), (1, 1, IN), (2, 3, IN), (16, IN)):
        x = torch.randn(shape).to(dtype)
        only_short()
        y = layer(x)
        only_short(False)
        assert y.dtype == dtype
        assert torch.equal(y, the_long_way(layer, x))
    turned = torch.randn(IN, 3).to(dtype).t()
    assert torch.equal(layer(turned), the_long_way(layer, turned))


@pytest.mark.parametrize(
    "x", [torch.randn(17, IN), torch.randn(0, IN), torch.randn(1, IN).double(), nn.Parameter(torch.randn(1, IN))]
)
@torch.no_grad()
def test_other_inputs_go_the_long_way(x):
    layer = layer_of(SPECS["hqq4"])
    layer(torch.randn(1, IN))
    assert torch.equal(layer(x), the_long_way(layer, x))


@torch.no_grad()
def test_a_view_with_the_other_sign_is_read_with_it():
    layer, x = layer_of(SPECS["hqq4"], bias=False), torch.randn(1, IN)
    assert torch.equal(layer(torch._neg_view(x)), -layer(x))


@torch.no_grad()
def test_a_bias_of_another_length_is_not_read_past_its_end():
    layer, x = layer_of(SPECS["hqq4"]), torch.randn(1, IN)
    layer.bias = nn.Parameter(torch.ones(1))
    torch.testing.assert_close(layer(x), x @ layer.dequantize().t() + 1)


@torch.no_grad()
def test_a_wrong_input_is_refused_as_before():
    layer = layer_of(SPECS["hqq4"])
    layer(torch.randn(1, IN))
    for x in (torch.randn(1, IN + 1), torch.zeros(1, IN, dtype=torch.int64), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="expected a floating input"):
            layer(x)


def write_in_place(layer):
    for name in layer._tensor_names:
        if layer._parameters[name].is_floating_point():
            layer._parameters[name].data.mul_(1.5)


def write_codes_in_place(layer):
    layer.codes.data.copy_(layer.codes.data.flip(0))


def replace_data(layer):
    for name in layer._tensor_names:
        layer._parameters[name].data = layer._parameters[name].data.flip(0).clone()


def replace_parameters(layer):
    for name in layer._tensor_names:
        layer._parameters[name] = nn.Parameter(layer._parameters[name].data.flip(0).clone(), requires_grad=False)


def write_weight(layer):
    layer.weight = torch.randn(OUT, IN)


def load_another(layer):
    layer.load_state_dict(QuantizedLinear.from_linear(nn.Linear(IN, OUT), layer.spec).state_dict())


def put_a_wider_value(layer):
    weight = get_method(layer.spec.method).quantize(torch.randn(OUT, IN), layer.spec.widened())
    layer.quantized_weight = weight


def write_bias(layer):
    layer.bias.data += 1


def drop_bias(layer):
    layer.bias = None


def to_bfloat16_and_back(layer):
    layer.to(torch.bfloat16).to(torch.float32)


CHANGES = [
    write_in_place,
    write_codes_in_place,
    replace_data,
    replace_parameters,
    write_weight,
    load_another,
    put_a_wider_value,
    write_bias,
    drop_bias,
    to_bfloat16_and_back,
]


@EACH_SPEC
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_every_change_of_the_layer_is_noticed(spec, change):
    layer, x = layer_of(spec), torch.randn(1, IN)
    before = layer(x)
    change(layer)
    after = layer(x)
    assert torch.equal(after, the_long_way(layer, x))
    assert torch.equal(after, layer(x))
    assert not torch.equal(after, before)


@EACH_SPEC
@torch.no_grad()
def test_a_half_precision_layer_notices_writes_to_what_the_kernel_reads_converted(spec):
    layer, x = layer_of(spec, dtype=torch.bfloat16), torch.randn(1, IN, dtype=torch.bfloat16)
    before = layer(x)
    write_in_place(layer)
    write_bias(layer)
    assert torch.equal(layer(x), the_long_way(layer, x))
    assert not torch.equal(layer(x), before)


@EACH_SPEC
@torch.no_grad()
def test_copies_have_a_way_of_their_own(spec):
    layer, x = layer_of(spec), torch.randn(1, IN)
    before = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for copied in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        write_in_place(copied)
        assert torch.equal(layer(x), before)
        assert torch.equal(copied(x), the_long_way(copied, x))
        assert not torch.equal(copied(x), before)


@torch.no_grad()
def test_a_weight_that_has_left_is_not_kept_in_memory():
    layer = layer_of(SPECS["hqq4"])
    layer(torch.randn(1, IN))
    left = [weakref.ref(layer._parameters[name].untyped_storage()) for name in layer._tensor_names]
    layer.to("meta")
    gc.collect()
    assert [ref() for ref in left] == [None] * len(left)
    with pytest.raises(RuntimeError, match="meta device"):
        layer(torch.randn(1, IN))


def test_gradients_and_compilers_go_the_long_way():
    layer, x = layer_of(SPECS["hqq4"]), torch.randn(1, IN)
    with torch.no_grad():
        y = layer(x)
    trained = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(trained).sum(), trained)
    torch.testing.assert_close(gradient, layer.dequantize().sum(0)[None])
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(lambda x: layer(x), fullgraph=True, backend=backend)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(compiled(x), y)
            layer(x)
    assert len(graphs) == 1
    assert "quantlayers.hqq_linear" in graphs[0]


@torch.no_grad()
def test_autocast_is_obeyed():
    layer, x = layer_of(SPECS["hqq4"]), torch.randn(1, IN)
    layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, the_long_way(layer, x))


@torch.no_grad()
def test_threads_share_a_layer():
    layer = layer_of(SPECS["aqlm"], dtype=torch.bfloat16)
    inputs = [torch.randn(1, IN, dtype=torch.bfloat16) for _ in range(4)]
    expected = [the_long_way(layer, x) for x in inputs]
    wrong = []

    def run(x, y):
        with torch.no_grad():
            wrong.extend(1 for _ in range(200) if not torch.equal(layer(x), y))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
