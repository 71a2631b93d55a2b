"""What every registered method must keep. A third method is tested by being registered; a toy one shows the cost."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from every_method import AbsmaxSpec
from peft import get_peft_model
from torch import Tensor, nn
from torch.autograd import forward_ad

import peft_quantlayers
from peft_quantlayers import QuantizedLinear, QuantizedWeight, QuantScalesConfig, quantize_model
from peft_quantlayers.formats.checkpoint import specs_from_json, specs_to_json
from peft_quantlayers.formats.quant_spec import METADATA_ROLES
from peft_quantlayers.layers import layer_type
from peft_quantlayers.methods import config_type, spec_from_dict

SHAPE = (16, 64)


def random_weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.05 * torch.randn(SHAPE)).to(dtype)


def test_the_default_spec_survives_json(method, spec):
    fields = json.loads(json.dumps(spec.to_dict()))
    assert fields["method"] == method.spec_type.method
    assert spec_from_dict(fields) == spec
    stored = json.loads(json.dumps(specs_to_json({"layer": spec})))
    assert specs_from_json(stored, spec_from_dict) == {"layer": spec}
    with pytest.raises(ValueError, match="unknown field"):
        spec_from_dict(fields | {"surprise": 1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantizing_keeps_the_layout_and_the_weight(method, spec, dtype):
    weight = random_weight(dtype)
    before = weight.clone()
    quantized = method.quantize(weight, spec)
    quantized.check("layer")
    assert (quantized.out_features, quantized.in_features) == SHAPE
    assert spec.codes_name in quantized.tensors
    assert not quantized.tensors[spec.codes_name].is_floating_point()
    layout = quantized.spec.tensor_layout(*SHAPE)
    assert [name for name, entry in layout.items() if entry.role == "codes"] == [spec.codes_name]
    nbytes = sum(tensor.nbytes for tensor in quantized.tensors.values())
    assert quantized.bits_per_weight == 8 * nbytes / weight.numel()
    assert torch.equal(weight, before)
    again = method.quantize(weight, spec)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in quantized.tensors.items())


def test_a_weight_that_lies_transposed_in_memory_gets_the_same_codes(method, spec):
    weight = random_weight()
    transposed = weight.t().contiguous().t()
    assert not transposed.is_contiguous()
    expected = method.quantize(weight, spec)
    found = method.quantize(transposed, spec)
    assert all(torch.equal(tensor, found.tensors[name]) for name, tensor in expected.tensors.items())


def test_another_default_device_changes_nothing(method, spec):
    """Loaders work inside ``torch.device("meta")``; a tensor that lands there has no memory for a kernel to read."""
    weight, x = random_weight(), torch.randn(3, SHAPE[1])
    hessian = x.t() @ x + torch.eye(SHAPE[1]) if method.can_use_hessian(spec) else None
    delta = 0.01 * torch.randn(SHAPE)

    def results() -> list[Tensor]:
        quantized = method.quantize(weight, spec, hessian=hessian)
        plain, merged = method.quantize(weight, spec), method.merged(quantized, lambda rows: delta[rows])
        found = [*quantized.tensors.values(), *plain.tensors.values(), *merged.tensors.values()]
        return [*found, method.dequantize(quantized), method.linear(x, quantized, None)]

    with torch.device("meta"):
        elsewhere = results()
    assert all(torch.equal(a, b) for a, b in zip(elsewhere, results(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantizing_gives_shape_dtype_and_about_the_weight(method, spec, dtype):
    weight = random_weight()
    quantized = method.quantize(weight, spec)
    dense = method.dequantize(quantized, dtype=dtype)
    assert dense.shape == SHAPE
    assert dense.dtype == dtype
    assert (dense.float() - weight).norm() < 0.5 * weight.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_are_the_rows_of_the_dequantized_weight(method, spec, dtype, set_tile_elements):
    set_tile_elements(6 * SHAPE[1])
    quantized = method.quantize(random_weight(), spec)
    dense = method.dequantize(quantized, dtype=dtype)
    tiles = method.weight_tiles(quantized, dtype=dtype)
    found = [(range(SHAPE[0])[rows], tile.clone()) for rows, tile in tiles]
    assert [row for rows, _ in found for row in rows] == list(range(SHAPE[0]))
    assert torch.equal(torch.cat([tile for _, tile in found]), dense)


@pytest.mark.parametrize("is_functional", [True, False], ids=["torch.func", "dual numbers"])
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_a_forward_mode_derivative_is_right_or_refused(method, spec, wants_gradient, is_functional):
    """A custom operator of torch has none, and gives zero without a word."""
    quantized = method.quantize(random_weight(), spec)
    layer = layer_type(spec.method)(quantized, None, compute_dtype=torch.float32)
    x, tangent = torch.randn(3, SHAPE[1], requires_grad=wants_gradient), torch.randn(3, SHAPE[1])
    refusal, found = "", None
    try:
        if is_functional:
            _, found = torch.func.jvp(layer, (x,), (tangent,))
        else:
            with forward_ad.dual_level():
                found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    except (NotImplementedError, RuntimeError) as error:
        refusal = str(error)
    if refusal:
        assert "forward-mode derivatives" in refusal or "autograd.Function" in refusal
    else:
        torch.testing.assert_close(found, tangent @ method.dequantize(quantized).t(), rtol=1e-3, atol=1e-4)


def test_rows_are_those_of_the_whole_weight(method, spec):
    quantized = method.quantize(random_weight(), spec)
    dense = method.dequantize(quantized)
    step = 2 * quantized.row_multiple
    for start in range(0, SHAPE[0] - step + 1, step):
        part = quantized.rows(slice(start, start + step))
        part.check("part")
        assert part.shape == (step, SHAPE[1])
        torch.testing.assert_close(method.dequantize(part), dense[start : start + step], rtol=0, atol=0)
    with pytest.raises(ValueError, match="no range"):
        quantized.rows(slice(4, 4))
    with pytest.raises(ValueError, match="no range"):
        quantized.rows(slice(0, 8, 2))


def test_codes_are_integers_that_are_packed_back_to_the_same_bits(method, spec):
    quantized = method.quantize(random_weight(), spec)
    codes = quantized.codes()
    assert not codes.is_floating_point()
    assert int(codes.min()) >= 0
    if spec.max_code is not None:
        assert tuple(codes.shape) == SHAPE
        assert int(codes.max()) <= spec.max_code
        # Ordered: along the codes a weight's value never changes direction.
        values = torch.stack(
            [method.dequantize(quantized.with_codes(torch.full_like(codes, c))) for c in range(spec.max_code + 1)]
        )
        steps = values.diff(dim=0)
        assert ((steps >= 0).all(0) | (steps <= 0).all(0)).all()
    again = quantized.with_codes(codes)
    again.check("again")
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in quantized.tensors.items())


def test_a_stack_of_weights_gives_each_of_them_back(method, spec):
    weights = [method.quantize(random_weight(), spec) for _ in range(3)]
    stack = QuantizedWeight.stacked(weights)
    stack.check("stack")
    assert stack.shape == (3, *SHAPE)
    assert stack.bits_per_weight == weights[0].bits_per_weight
    for index, weight in enumerate(weights):
        assert torch.equal(method.dequantize(stack[index]), method.dequantize(weight))
        assert torch.equal(stack.codes()[index], weight.codes())
        half = slice(0, SHAPE[0] // 2)
        assert torch.equal(method.dequantize(stack.rows(half)[index]), method.dequantize(weight)[half])
    with pytest.raises(IndexError, match="out of range"):
        stack[3]
    with pytest.raises(IndexError, match="out of range"):
        weights[0][0]
    with pytest.raises(ValueError, match="one spec and one shape"):
        QuantizedWeight.stacked([])


def second_moment() -> Tensor:
    x = torch.randn(512, 8) @ torch.randn(8, SHAPE[1]) + 0.3 * torch.randn(512, SHAPE[1])
    return x.t() @ x / len(x)


def test_a_hessian_lowers_the_output_error_or_cannot_be_used(method, spec):
    if not method.can_use_hessian(spec):
        assert method.calibration_requirement  # which errors give as the reason
        pytest.skip(method.calibration_requirement)
    weight, hessian = random_weight(), second_moment()
    errors = []
    for given in (None, hessian):
        quantized = method.quantize(weight, spec, hessian=given)
        quantized.check("layer")
        difference = method.dequantize(quantized) - weight
        errors.append(float(((difference @ hessian) * difference).sum()))
    assert errors[1] < 0.8 * errors[0]


def test_a_merged_delta_far_below_a_step_is_retained_and_nothing_else_moves(method, spec):
    quantized = method.quantize(random_weight(), spec)
    before = method.dequantize(quantized)
    unchanged = method.merged(quantized, lambda rows: torch.zeros_like(before)[rows])
    assert all(torch.equal(tensor, unchanged.tensors[name]) for name, tensor in quantized.tensors.items())
    delta = torch.randn(SHAPE[0], 4) @ torch.randn(4, SHAPE[1])
    delta *= 0.05 * before.norm() / delta.norm()
    delta[3] = 0
    merged = method.merged(quantized, lambda rows: delta[rows])
    merged.check("layer")
    moved = method.dequantize(merged) - before
    assert float((moved * delta).sum() / delta.square().sum()) == pytest.approx(1.0, abs=0.4)
    assert not moved[3].any()
    assert [name for name in merged.tensors if not torch.equal(merged.tensors[name], quantized.tensors[name])] == [
        spec.codes_name
    ]


@pytest.mark.parametrize("lead", [(), (0,), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_product_with_the_dequantized_weight(method, spec, bias, lead):
    quantized = method.quantize(random_weight(), spec)
    dense = method.dequantize(quantized)
    bias = torch.randn(SHAPE[0]) if bias else None
    x = torch.randn(*lead, SHAPE[1])
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = method.linear(x1, quantized, bias)
    expected = F.linear(x2, dense, bias)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad)
    half = method.linear(x.bfloat16(), quantized, bias)
    assert half.dtype == torch.bfloat16
    assert half.shape == expected.shape


def test_a_quantized_weight_is_its_own_best_successor(method, spec):
    first = method.quantize(random_weight(), spec)
    dense = method.dequantize(first)
    second = method.quantize(dense, first.spec, start=first)
    again = method.dequantize(second)
    torch.testing.assert_close(again, dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(method, spec, bad):
    weight = random_weight()
    weight[3, 3] = bad
    with pytest.raises(ValueError, match=r"model\.q_proj"):
        QuantizedLinear.from_weight(weight, None, spec, layer_name="model.q_proj")


def test_a_layer_holds_writes_and_comes_back_from_its_state(method, spec):
    layer = QuantizedLinear.from_linear(nn.Linear(SHAPE[1], SHAPE[0]), spec, layer_name="model.q_proj")
    assert type(layer) is layer_type(spec.method)
    x = torch.randn(2, SHAPE[1])
    torch.testing.assert_close(layer(x), F.linear(x, layer.dequantize(), layer.bias))
    assert sum(p.numel() for p in layer.parameters()) == SHAPE[0] * SHAPE[1] + SHAPE[0]

    written = random_weight()
    layer.weight.data.copy_(written)
    expected = method.quantize(written, spec)
    assert all(torch.equal(layer.get_parameter(name), tensor) for name, tensor in expected.tensors.items())

    empty = QuantizedLinear.empty(
        layer.spec, out_features=SHAPE[0], in_features=SHAPE[1], bias=True, compute_dtype=torch.float32, device="cpu"
    )
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    codes = layer.codes.detach().clone()
    layer.to(torch.bfloat16)
    assert layer.compute_dtype == torch.bfloat16
    assert torch.equal(layer.codes, codes)


def test_tensors_with_a_role_train_as_a_peft_method_and_merge_without_loss(method, spec):
    roles = spec.trainable_roles(*SHAPE)
    assert set(roles.values()) <= set(METADATA_ROLES)
    assert spec.codes_name not in roles
    layer = QuantizedLinear.from_linear(nn.Linear(SHAPE[1], SHAPE[0]), spec, layer_name="0")
    before, x, wanted = copy.deepcopy(layer), torch.randn(8, SHAPE[1]), torch.randn(8, SHAPE[0])
    config = QuantScalesConfig(target_modules=["0"], train=tuple(roles.values()) or METADATA_ROLES)
    if not roles:
        with pytest.raises(ValueError, match=r"there are no \['codebooks', 'scales', 'zeros'\] to train"):
            get_peft_model(nn.Sequential(layer), config)
        return
    model = get_peft_model(nn.Sequential(layer), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == len(roles)
    optimizer = torch.optim.Adam(trained, lr=1e-4)
    losses = []
    for _ in range(5):
        loss = (model(x) - wanted).square().mean()
        loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = model(x)
    model.merge_adapter()
    # The order of a sum may differ: the kernel that is chosen depends on the dtypes, which merging widens.
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert all(not torch.equal(layer.get_parameter(name), before.get_parameter(name)) for name in roles)
    model.unmerge_adapter()
    assert layer.spec == before.spec
    for name, tensor in before.state_dict().items():
        assert layer.get_parameter(name).dtype == tensor.dtype
        assert torch.equal(layer.get_parameter(name), tensor), name
    merged = model.merge_and_unload()[0]
    assert merged is layer
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(merged.codes, before.codes)
    merged.quantized_weight.check("0")


def test_a_method_quantizes_whole_models_by_a_config_that_is_made_for_it():
    config = config_type(AbsmaxSpec)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8))
    x = torch.randn(4, 64)
    expected = model(x)
    quantize_model(model, config(skip_modules=["2"]), progress=False)
    assert [type(module).__name__ for module in model] == ["AbsmaxLinear", "ReLU", "Linear"]
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0.02)
    assert set(model.state_dict()) == {"0.codes", "0.scale", "0.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"compute_dtype": "nonsense"}, ValueError),
        ({"skip_modules": "abc"}, TypeError),
        ({"quantize_lm_head": "yes"}, ValueError),
        ({"overrides": {"q_proj": {"no_such_field": 1}}}, ValueError),
        ({"no_such_field": 1}, TypeError),
    ],
    ids=lambda value: str(value),
)
def test_every_config_is_validated(method, fields, error):
    with pytest.raises(error, match=next(iter(fields)).removeprefix("no_such_")):
        config_type(method.spec_type)(**fields)


def test_spec_config_and_layer_class_are_found_by_name_in_the_package(method):
    made = (method.spec_type, config_type(method.spec_type), layer_type(method.spec_type.method))
    for found in made:
        assert getattr(peft_quantlayers, found.__name__).__name__ == found.__name__
    with pytest.raises(AttributeError, match="NoSuchConfig"):
        _ = peft_quantlayers.NoSuchConfig


def test_a_class_is_made_for_a_method_that_brings_none():
    toy = layer_type("toy_absmax")
    assert toy is layer_type("toy_absmax")
    assert issubclass(toy, QuantizedLinear)
    with pytest.raises(ValueError, match="unknown quantization method"):
        layer_type("no_such_method")


def test_a_config_pickles(config):
    if config.spec_type is AbsmaxSpec:
        pytest.skip("the toy's config class is made for it, and belongs to no module")
    assert pickle.loads(pickle.dumps(config)) == config
