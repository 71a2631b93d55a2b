"""A quantized layer as a module: products, gradients, dtypes, copies, state, compilers."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from every_method import all_methods, quick_spec
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_quantlayers import HQQLinear, HQQSpec
from peft_quantlayers.layers import QuantizedLinear, layer_type

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_layer(
    out_features: int = 8,
    in_features: int = 48,
    *,
    method: str = "hqq",
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    **fields,
) -> QuantizedLinear:
    torch.manual_seed(1)
    dense = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    fields = {"group_size": 8} | fields if method == "hqq" else fields
    spec = dataclasses.replace(quick_spec(method), **fields)
    return QuantizedLinear.from_linear(dense, spec, layer_name="model.q_proj")


def dense_form(layer: QuantizedLinear, dtype: torch.dtype | None = None) -> nn.Linear:
    dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    dense.weight = nn.Parameter(layer.dequantize(dtype))
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().clone())
    return dense


def assert_same_state(layer: nn.Module, other: nn.Module) -> None:
    state, other_state = layer.state_dict(), other.state_dict()
    assert list(state) == list(other_state)
    for name, tensor in state.items():
        assert tensor.dtype == other_state[name].dtype
        assert torch.equal(tensor, other_state[name]), name


# ----- what the layer is -----


def test_the_layer_is_an_nn_linear_with_frozen_tensors():
    layer = make_layer()
    assert isinstance(layer, nn.Linear)
    assert type(layer) is layer_type("hqq") is HQQLinear
    assert (layer.out_features, layer.in_features) == (8, 48)
    assert list(dict(layer.named_parameters())) == ["W_q", "scale", "zero", "bias"]
    assert {name: parameter.dtype for name, parameter in layer.named_parameters()} == {
        "W_q": torch.uint8,
        "scale": torch.float16,
        "zero": torch.float16,
        "bias": torch.float32,
    }
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["bias"]
    assert list(dict(layer.named_buffers())) == []
    assert "weight" not in layer.state_dict()
    assert "nbits=4, group_size=8, axis=1" in repr(layer)


def test_quantizing_leaves_the_dense_layer_and_shares_its_bias_and_mode():
    dense = nn.Linear(48, 8).eval()
    before = copy.deepcopy(dense.state_dict())
    layer = HQQLinear.from_linear(dense, HQQSpec(group_size=8))
    assert layer.bias is dense.bias
    assert layer.bias.requires_grad
    assert not layer.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_a_frozen_bias_stays_frozen():
    dense = nn.Linear(48, 8)
    dense.bias.requires_grad_(False)
    assert not HQQLinear.from_linear(dense, HQQSpec(group_size=8)).bias.requires_grad


def test_the_base_class_makes_the_layer_of_the_method():
    assert type(QuantizedLinear.from_linear(nn.Linear(48, 8), HQQSpec(group_size=8))) is HQQLinear


def test_quantizing_a_quantized_layer_is_refused_by_name():
    with pytest.raises(ValueError, match="again: the layer is quantized already"):
        HQQLinear.from_linear(make_layer(), HQQSpec(), layer_name="again")


def test_a_weight_of_one_method_in_the_layer_of_another_is_refused():
    layer = make_layer()
    with pytest.raises(TypeError, match="belongs in a HQQLinear"):
        QuantizedLinear(layer.quantized_weight, compute_dtype=torch.float32)


@pytest.mark.parametrize(
    "fields", [{}, {"nbits": 3}, {"nbits": 1, "axis": 0}, {"group_size": 1}, {"group_size": None}]
)
@pytest.mark.parametrize("bias", [True, False])
def test_the_parameters_add_up_to_those_of_the_dense_layer(fields, bias):
    layer = make_layer(bias=bias, **fields)
    dense = nn.Linear(48, 8, bias=bias)
    assert sum(parameter.numel() for parameter in layer.parameters()) == sum(p.numel() for p in dense.parameters())
    assert layer.W_q.nelement() == layer.W_q.shape[0] * layer.W_q.shape[1] == layer.W_q.nbytes
    assert layer.W_q.data.numel() == layer.W_q.nelement()
    assert layer.state_dict()["W_q"].numel() == layer.W_q.nelement()


def test_an_optimizer_sees_no_quantized_parameters_as_trainable():
    layer = make_layer()
    trainable = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    assert len(trainable) == 1
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)  # all of them, as Trainer-like code does
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(torch.randn(3, 48)).square().sum().backward()
    optimizer.step()
    after = layer.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["bias"]


# ----- products and gradients -----


@pytest.mark.parametrize("lead", [(), (0,), (1,), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("fields", [{}, {"nbits": 3, "axis": 0}, {"nbits": 8, "group_size": None}])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward_equal_the_dense_layer_with_the_dequantized_weight(bias, fields, lead):
    layer = make_layer(bias=bias, **fields)
    dense = dense_form(layer)
    x = torch.randn(*lead, 48)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = layer(x1), dense(x2)
    assert y1.dtype == y2.dtype
    torch.testing.assert_close(y1, y2)
    grad = torch.randn_like(y2)
    y1.backward(grad)
    y2.backward(grad)
    torch.testing.assert_close(x1.grad, x2.grad)
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    assert layer.W_q.grad is None
    assert layer.scale.grad is None


@pytest.mark.parametrize("x_dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("compute_dtype", DTYPES)
def test_any_input_dtype_meets_any_compute_dtype(compute_dtype, x_dtype):
    layer = make_layer(dtype=compute_dtype)
    x = torch.randn(4, 48).to(x_dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == x_dtype
    y.backward(torch.ones_like(y))
    assert x.grad.dtype == x_dtype
    weight = layer.dequantize(torch.float64)
    truth = F.linear(x.detach().double(), weight, layer.bias.detach().double())
    # a product of random numbers in a dtype has an error of about half its epsilon, beside the rounding of the output
    eps = max(torch.finfo(x_dtype).eps, torch.finfo(compute_dtype).eps)
    assert (y.detach().double() - truth).norm() <= eps * truth.norm()
    grad_truth = weight.sum(0).expand(4, 48)
    assert (x.grad.double() - grad_truth).norm() <= eps * grad_truth.norm()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@all_methods
def test_autocast_gives_its_dtype_forward_and_the_inputs_dtype_backward(method, compute_dtype, dtype, x_dtype):
    layer = make_layer(method=method, dtype=compute_dtype)
    dense = dense_form(layer, torch.float32)
    x = torch.randn(4, 48).to(x_dtype)
    results = []
    for module in (layer, dense):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            y = module(leaf)
        assert y.dtype == dtype
        y.float().square().sum().backward()
        assert leaf.grad.dtype == x_dtype
        assert module.bias.grad.dtype == module.bias.dtype
        results.append((y.detach().double(), leaf.grad.double(), module.bias.grad.double()))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 2 * torch.finfo(torch.bfloat16).eps * theirs.norm()


def test_scale_and_zero_can_be_trained():
    layer = make_layer(scale_dtype="float32")
    layer.scale.requires_grad_()
    layer.zero.requires_grad_()
    layer(torch.randn(5, 48)).square().mean().backward()
    assert layer.scale.grad.abs().sum() > 0
    assert layer.zero.grad.abs().sum() > 0


def test_gradient_checkpointing_gives_the_same_gradients():
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(48, 48), nn.GELU(), make_layer(48, 48), nn.GELU(), make_layer(8, 48))

    torch.manual_seed(5)
    model = make()
    x = torch.randn(4, 48)
    gradients = []
    for is_checkpointed in (False, True):
        for use_reentrant in (False, True):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            y = checkpoint(model, leaf, use_reentrant=use_reentrant) if is_checkpointed else model(leaf)
            y.square().sum().backward()
            gradients.append([leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for other in gradients[1:]:
        for first, second in zip(gradients[0], other, strict=True):
            assert torch.equal(first, second)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("bias", [True, False])
@all_methods
def test_the_layer_compiles_into_one_graph(method, bias):
    layer = make_layer(method=method, bias=bias)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 48, requires_grad=True)
    y, expected = compiled(x), layer(x)
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(expected, x, grad)[0])
    assert torch.equal(compiled(torch.randn(7, 48)[:3] * 0 + x), expected)


@pytest.mark.usefixtures("fresh_compiler")
@all_methods
def test_reading_the_weight_compiles_into_one_graph(method):
    layer = make_layer(method=method)
    norm = torch.compile(
        lambda x: F.linear(x, layer.weight).norm() + layer.weight.norm(), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(3, 48)
    torch.testing.assert_close(norm(x), F.linear(x, layer.dequantize()).norm() + layer.dequantize().norm())


# ----- moves and dtypes -----


CASTS = {
    "to": lambda module: module.to(torch.bfloat16),
    "to_kw": lambda module: module.to(dtype=torch.bfloat16, device="cpu"),
    "bfloat16": lambda module: module.bfloat16(),
    "type": lambda module: module.type(torch.bfloat16),
    "twice": lambda module: module.half().float().to(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_cast_changes_the_compute_dtype_and_the_bias_alone(cast, is_nested):
    layer = make_layer(scale_dtype="float32")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    CASTS[cast](nn.Sequential(layer, nn.Linear(8, 8)) if is_nested else layer)
    for name in ("W_q", "scale", "zero"):
        assert layer.get_parameter(name).dtype == before[name].dtype
        assert torch.equal(layer.get_parameter(name), before[name])
    assert layer.bias.dtype == layer.compute_dtype == layer.weight.dtype == torch.bfloat16
    assert layer(torch.randn(2, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.W_q.numel() + layer.scale.numel() + layer.zero.numel() == 8 * 48


def test_a_move_to_meta_and_back_keeps_layout_dtypes_and_count():
    layer = make_layer()
    layer.to("meta")
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    assert layer.weight.device.type == "meta"
    assert layer(torch.randn(2, 48, device="meta")).shape == (2, 8)
    with pytest.raises(RuntimeError, match=r"meta device, without numbers\. Load the weights"):
        layer(torch.randn(2, 48))
    assert sum(parameter.numel() for parameter in layer.parameters()) == 8 * 48 + 8
    layer.to_empty(device="cpu")
    layer.load_state_dict(make_layer().state_dict())
    assert_same_state(layer, make_layer())
    assert sum(parameter.numel() for parameter in layer.parameters()) == 8 * 48 + 8


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
@all_methods
def test_a_copy_is_the_same_layer_and_shares_nothing(method, copied):
    layer = make_layer(method=method).to(torch.bfloat16).eval()
    other = copied(layer)
    assert type(other) is layer_type(method)
    assert_same_state(other, layer)
    assert (other.spec, other.compute_dtype, other.layer_name) == (layer.spec, torch.bfloat16, "model.q_proj")
    assert not other.training
    assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in layer.parameters())
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in layer.parameters()]
    before = layer.dequantize()
    other.weight.data.zero_()
    assert torch.equal(other.dequantize(), torch.zeros(8, 48, dtype=torch.bfloat16))
    assert torch.equal(layer.dequantize(), before)
    x = torch.randn(2, 48)
    assert torch.equal(copied(layer)(x), layer(x))


@all_methods
def test_torch_save_gives_the_same_layer_back(method):
    layer = make_layer(method=method)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert_same_state(torch.load(file, weights_only=False), layer)


@pytest.mark.parametrize("fields", [{}, {"nbits": 3, "axis": 0, "scale_dtype": "bfloat16"}])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_state_dict_fills_an_empty_layer(fields, bias, device):
    layer = make_layer(bias=bias, dtype=torch.bfloat16, **fields)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    empty = QuantizedLinear.empty(
        layer.spec, out_features=8, in_features=48, bias=bias, compute_dtype=torch.bfloat16, device=device
    )
    assert type(empty) is HQQLinear
    empty.load_state_dict(state, assign=device == "meta")
    assert_same_state(empty, layer)
    assert not any(p.requires_grad for name, p in empty.named_parameters() if name != "bias")
    assert sum(p.numel() for p in empty.parameters()) == sum(p.numel() for p in layer.parameters())
    x = torch.randn(2, 48, dtype=torch.bfloat16)
    assert torch.equal(empty(x), layer(x))


def test_a_state_dict_with_a_dense_weight_is_not_taken_in_silence():
    layer = make_layer()
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(nn.Linear(48, 8).state_dict())


# ----- the quantized weight as a value -----


def test_the_quantized_weight_can_be_kept_and_put_back_to_the_bit():
    layer = make_layer()
    kept, before = layer.quantized_weight, copy.deepcopy(layer.state_dict())
    kept.check("layer")
    layer.weight.data.zero_()
    assert not torch.equal(layer.W_q, before["W_q"])
    assert torch.equal(kept.tensors["W_q"], before["W_q"])
    layer.quantized_weight = kept
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_a_weight_that_its_metadata_cannot_hold_changes_the_spec_and_can_go_back(caplog):
    layer = make_layer()
    kept = layer.quantized_weight
    layer.weight = torch.randn(8, 48) * 1e6
    assert "model.q_proj" in caplog.text
    assert layer.spec.scale_dtype == "float32"
    assert layer.scale.dtype == torch.float32
    layer.quantized_weight.check("layer")
    assert not layer.scale.requires_grad
    layer.quantized_weight = kept
    assert layer.spec.scale_dtype == "float16"
    assert layer.scale.dtype == torch.float16
    assert sum(p.numel() for p in layer.parameters()) == 8 * 48 + 8


def test_a_quantized_weight_of_another_shape_is_refused():
    layer, before = make_layer(), make_layer()
    with pytest.raises(ValueError, match=r"model\.q_proj"):
        layer.quantized_weight = make_layer(16, 48).quantized_weight
    assert_same_state(layer, before)


def test_reset_parameters_leaves_the_codes_alone():
    layer = make_layer()
    layer.reset_parameters()
    assert_same_state(layer, make_layer())


def test_parameters_are_shared_in_memory_between_processes_as_those_of_any_module():
    layer = make_layer()
    layer.share_memory()
    assert all(parameter.is_shared() for parameter in layer.parameters())
    assert_same_state(layer, make_layer())


def test_a_width_and_a_height_of_one_work():
    layer = HQQLinear.from_linear(nn.Linear(1, 1), HQQSpec(group_size=None))
    x = torch.randn(3, 1)
    torch.testing.assert_close(layer(x), F.linear(x, layer.dequantize(), layer.bias))
