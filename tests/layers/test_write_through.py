"""``layer.weight``: reads as the dequantized weight, and every write reaches the layer or is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

from peft_quantlayers import HQQConfig, HQQLinear, HQQSpec
from peft_quantlayers.layers.linear import QuantizedLinear

SPEC = HQQSpec(nbits=4, group_size=16)


def make_layer(
    out_features: int = 8, in_features: int = 32, dtype: torch.dtype = torch.float32, **fields
) -> HQQLinear:
    torch.manual_seed(1)
    dense = nn.Linear(in_features, out_features, dtype=dtype)
    return HQQLinear.from_linear(dense, HQQSpec(nbits=4, group_size=16, **fields), layer_name="model.q_proj")


def bits(layer: QuantizedLinear) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def has_bits(layer: QuantizedLinear, expected: dict[str, torch.Tensor]) -> bool:
    now = layer.state_dict()
    return set(now) == set(expected) and all(torch.equal(now[name], expected[name]) for name in expected)


def quantized_form(layer: QuantizedLinear, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return layer.method.quantize(weight, layer.spec).tensors


def assert_holds(layer: QuantizedLinear, weight: torch.Tensor) -> None:
    """The layer's tensors are the bits that quantizing ``weight`` gives."""
    for name, tensor in quantized_form(layer, weight).items():
        assert torch.equal(getattr(layer, name), tensor), name


# ----- reading -----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_reads_as_the_dequantized_weight(dtype):
    layer = make_layer(dtype=dtype)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.dtype, weight.device) == ((8, 32), dtype, layer.codes.device)
    assert not weight.requires_grad
    dense = layer.dequantize()
    assert torch.equal(weight, dense)
    assert torch.equal(weight.clone(), dense)
    assert torch.equal(weight @ torch.eye(32, dtype=dtype), dense)
    assert torch.equal(weight.t()[3], dense[:, 3])
    assert weight.tolist() == dense.tolist()
    assert float(weight.sum()) == float(dense.sum())
    assert str(dense)[8:30] in repr(weight)


def test_reading_changes_nothing_and_shape_and_dtype_cost_nothing(monkeypatch):
    layer = make_layer()
    before = bits(layer)
    weight = layer.weight + 1
    torch.linalg.svdvals(layer.weight.float())
    layer.weight.abs().mean()
    torch.cat([layer.weight, weight])
    assert has_bits(layer, before)
    monkeypatch.setattr(QuantizedLinear, "dequantize", lambda self: pytest.fail("the weight was dequantized"))
    assert layer.weight.shape == (8, 32)
    assert layer.weight.data.numel() == 256
    assert layer.weight.to(torch.float32).dtype == torch.float32
    assert layer.weight.device.type == "cpu"


def test_a_computed_value_is_a_plain_tensor_and_no_longer_the_layer():
    layer = make_layer()
    before = bits(layer)
    for computed in (
        layer.weight.clone(),
        layer.weight * 2,
        layer.weight.t() @ torch.ones(8, 1),
        layer.weight.to(torch.float64),
    ):
        assert type(computed) is torch.Tensor
        computed.zero_()
    assert has_bits(layer, before)


def test_copies_and_pickles_of_the_weight_are_plain_tensors():
    layer = make_layer()
    for copied in (copy.deepcopy(layer.weight), pickle.loads(pickle.dumps(layer.weight))):
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, layer.dequantize())


# ----- writing -----

W = 0.05 * torch.randn(8, 32, generator=torch.Generator().manual_seed(3))


def assign(layer):
    layer.weight = W


def assign_a_parameter(layer):
    layer.weight = nn.Parameter(W)


def assign_data(layer):
    layer.weight.data = W


def set_attribute(layer):
    setattr(layer, "weight", W.double())  # noqa: B010


def copy_in_place(layer):
    layer.weight.copy_(W)


def copy_into_data(layer):
    layer.weight.data.copy_(W)


def copy_into_detached(layer):
    layer.weight.detach().copy_(W)


def copy_into_a_transposed_view(layer):
    layer.weight.t().copy_(W.t())


def copy_into_a_view_of_a_view(layer):
    layer.weight.data.view(4, 64).t().copy_(W.view(4, 64).t())


def copy_into_rows(layer):
    for row in range(8):
        layer.weight[row] = W[row]


def copy_into_columns(layer):
    layer.weight[:, :16] = W[:, :16]
    weight = layer.weight
    weight[:, :16] = W[
        :, :16
    ]  # the read one holds what is written to it, so that the rows' grids are the last write's
    weight[:, 16:] = W[:, 16:]


def copy_into_chunks(layer):
    weight = layer.weight
    for part, written in zip(weight.chunk(2), W.chunk(2), strict=True):
        part.copy_(written)


def write_by_mask(layer):
    weight = layer.weight
    weight[torch.ones(8, 32, dtype=torch.bool)] = W.reshape(-1)


def write_out(layer):
    torch.add(W, 0, out=layer.weight)


def write_out_matmul(layer):
    torch.mm(W, torch.eye(32), out=layer.weight.data)


def foreach(layer):
    weight = layer.weight
    torch._foreach_zero_([weight])
    torch._foreach_add_([weight], [W])


def foreach_copy(layer):
    torch._foreach_copy_([layer.weight], [W])


def under_no_grad(layer):
    with torch.no_grad():
        layer.weight.zero_().add_(W)


def under_inference_mode(layer):
    with torch.inference_mode():
        layer.weight.copy_(W)


def assign_under_inference_mode(layer):
    with torch.inference_mode():
        layer.weight = W.clone()


def index_copy(layer):
    layer.weight.index_copy_(0, torch.arange(8), W)


WRITES = [
    assign, assign_a_parameter, assign_data, set_attribute, copy_in_place, copy_into_data, copy_into_detached,
    copy_into_a_transposed_view, copy_into_a_view_of_a_view, copy_into_rows, copy_into_columns, copy_into_chunks,
    write_by_mask, write_out, write_out_matmul, foreach, foreach_copy, under_no_grad, under_inference_mode,
    assign_under_inference_mode, index_copy,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_write_reaches_the_layer(write):
    layer = make_layer()
    assert not has_bits(layer, quantized_form(layer, W) | {"bias": layer.bias})
    parameters = dict(layer.named_parameters())
    write(layer)
    assert_holds(layer, W)
    assert dict(layer.named_parameters()).keys() == parameters.keys() == {"W_q", "scale", "zero", "bias"}
    assert all(layer.get_parameter(name) is parameter for name, parameter in parameters.items())
    x = torch.randn(2, 32, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(2, 32))


def delta_by_data(layer):
    layer.weight.data += D


def delta_by_add(layer):
    layer.weight.data.add_(D)


def delta_by_weight(layer):
    layer.weight += D


def delta_by_difference(layer):
    layer.weight.data -= -D


def delta_by_addmm(layer):
    layer.weight.data.addmm_(D, torch.eye(32))


def delta_by_foreach(layer):
    torch._foreach_add_([layer.weight], [D])


def delta_by_view(layer):
    layer.weight.data.view(-1).add_(D.view(-1))


D = 0.02 * torch.randn(8, 32, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    "write",
    [
        delta_by_data,
        delta_by_add,
        delta_by_weight,
        delta_by_difference,
        delta_by_addmm,
        delta_by_foreach,
        delta_by_view,
    ],
    ids=lambda write: write.__name__,
)
def test_a_delta_is_added_to_the_dequantized_weight_and_quantized_once(write, monkeypatch):
    layer = make_layer()
    expected = layer.dequantize() + D
    n_writes = []
    write_weight = QuantizedLinear.write_weight
    monkeypatch.setattr(
        QuantizedLinear, "write_weight", lambda self, weight: n_writes.append(1) or write_weight(self, weight)
    )
    write(layer)
    assert_holds(layer, expected)
    assert len(n_writes) == 1


@pytest.mark.parametrize(
    ("initialise", "expected"),
    [
        (nn.init.zeros_, torch.zeros(8, 32)),
        (nn.init.ones_, torch.ones(8, 32)),
        (lambda weight: nn.init.constant_(weight, -0.5), torch.full((8, 32), -0.5)),
    ],
)
def test_an_initialisation_reaches_the_layer(initialise, expected):
    layer = make_layer()
    initialise(layer.weight)
    assert torch.equal(layer.dequantize(), expected)


@pytest.mark.parametrize(
    "initialise", [nn.init.normal_, nn.init.kaiming_uniform_, nn.init.orthogonal_, nn.init.trunc_normal_]
)
def test_a_random_initialisation_reaches_the_layer(initialise):
    layer = make_layer()
    before = layer.dequantize()
    weight = layer.weight
    initialise(weight)
    assert_holds(layer, weight.clone())
    assert not torch.allclose(layer.dequantize(), before)


def test_what_was_written_is_read_back_quantized_on_the_next_read():
    layer = make_layer()
    weight = layer.weight
    weight.copy_(W)
    assert torch.equal(weight, W)
    assert torch.equal(layer.weight, layer.dequantize())
    assert not torch.equal(layer.weight, W)


def test_assigning_the_weight_to_itself_keeps_the_bits():
    layer = make_layer()
    before = bits(layer)
    layer.weight = layer.weight
    layer.weight.data = layer.weight.data
    assert has_bits(layer, before)


def test_a_weight_that_was_read_before_another_write_can_be_assigned_back():
    layer = make_layer()
    earlier = layer.weight
    values = earlier.clone()  # the numbers are read
    layer.weight.data.zero_()
    assert torch.equal(layer.dequantize(), torch.zeros(8, 32))
    layer.weight = earlier
    assert_holds(layer, values)


def test_a_view_of_the_weight_assigned_to_it_is_written():
    layer = make_layer(32, 32)
    transposed = layer.dequantize().t()
    layer.weight = layer.weight.t()
    assert_holds(layer, transposed)
    flipped = layer.dequantize().t()
    layer.weight.data = layer.weight.data.t()
    assert_holds(layer, flipped)


def test_the_weight_of_another_layer_can_be_assigned():
    layer, other = make_layer(), make_layer(axis=1)
    other.weight = W
    layer.weight = other.weight
    assert_holds(layer, other.dequantize())
    layer.weight.data.zero_()
    assert_holds(other, W)


@pytest.mark.parametrize("out_of", ["numpy", "array"])
def test_a_numpy_view_is_read_only(out_of):
    import numpy as np

    layer = make_layer()
    array = layer.weight.numpy() if out_of == "numpy" else np.asarray(layer.weight)
    np.testing.assert_array_equal(array, layer.dequantize().numpy())
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


# ----- refused -----


@pytest.mark.parametrize(
    "written",
    [torch.zeros(8, 31), torch.zeros(32, 8), torch.zeros(256), torch.zeros(1, 8, 32), torch.full((8, 32), torch.nan)],
    ids=["shape", "transposed", "flat", "3-D", "NaN"],
)
@pytest.mark.parametrize("name", ["weight", "weight.data"])
def test_a_refused_write_names_the_layer_and_leaves_every_bit(name, written):
    layer = make_layer()
    before = bits(layer)
    with pytest.raises(ValueError, match=r"model\.q_proj"):
        setattr(layer if name == "weight" else layer.weight, name.split(".")[-1], written)
    assert has_bits(layer, before)


def test_an_in_place_write_of_nan_is_refused_and_leaves_every_bit():
    layer = make_layer()
    before = bits(layer)
    for write in (
        lambda: layer.weight.data.div_(0),
        lambda: layer.weight.fill_(torch.inf),
        lambda: layer.weight.mul_(torch.nan),
    ):
        with pytest.raises(ValueError, match=r"model\.q_proj.*NaN or Inf"):
            write()
        assert has_bits(layer, before)


def test_a_write_to_the_data_of_a_view_is_refused():
    layer = make_layer()
    before = bits(layer)
    with pytest.raises(NotImplementedError, match=r"layer\.weight itself"):
        layer.weight.t().data = torch.zeros(32, 8)
    assert has_bits(layer, before)


def test_a_gradient_is_refused_by_name():
    layer = make_layer()
    for ask in (
        lambda w: w.requires_grad_(),
        lambda w: w.requires_grad_(True),
        lambda w: setattr(w, "requires_grad", True),
    ):
        with pytest.raises(NotImplementedError, match=r"model\.q_proj.*[Aa]dapter"):
            ask(layer.weight)
    layer.weight.requires_grad_(False)
    layer.weight.requires_grad = False


def test_registering_or_deleting_the_weight_is_refused():
    layer = make_layer()
    before = bits(layer)
    with pytest.raises(KeyError):
        layer.register_parameter("weight", nn.Parameter(W))
    with pytest.raises(AttributeError):
        del layer.weight
    assert has_bits(layer, before)
    assert torch.equal(layer.weight, layer.dequantize())


def test_a_config_is_a_spec_too_but_a_layer_keeps_the_plain_spec():
    layer = HQQLinear.from_linear(nn.Linear(64, 8), HQQConfig(nbits=3).spec_for("layer"))
    assert layer.spec == HQQSpec(nbits=3)
