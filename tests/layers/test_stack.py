"""A stack of experts in place of a fused parameter: products, gradients, reading, writing, copies, state."""

import copy
import dataclasses
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from every_method import all_methods, quick_spec
from mixtures import MIXTURES, tiny_mixture
from torch import nn

import peft_quantlayers as pql
from peft_quantlayers.formats import QuantizedWeight
from peft_quantlayers.integrations.parallel_loading import refuse_parallel_loading
from peft_quantlayers.layers.expert_types import FusedWeight, dense_stacks
from peft_quantlayers.layers.replace_stack import put_dense, put_stack, quantize_stack, quantized_experts
from peft_quantlayers.layers.stack import QuantizedStack
from peft_quantlayers.methods import HQQSpec, get_method

SPEC = HQQSpec(nbits=4, group_size=16)
IDS = torch.randint(3, 128, (2, 17), generator=torch.Generator().manual_seed(3))


def make_stack(method: str = "hqq", n_experts: int = 3, *, is_transposed: bool = False, dtype=torch.float32):
    torch.manual_seed(1)
    weights = torch.randn(n_experts, 8, 48, dtype=dtype)
    spec = SPEC if method == "hqq" else quick_spec(method)
    quantized = quantized_experts(weights, n_experts, spec, layer_name="experts.up")
    return QuantizedStack(quantized, compute_dtype=dtype, layer_name="experts.up", is_transposed=is_transposed)


def quantize_all(model: nn.Module, spec=SPEC) -> list[str]:
    names = [name for name, _, _ in dense_stacks(model)]
    for name in names:
        quantize_stack(model, name, spec)
    return names


def dense_twin(model: nn.Module) -> nn.Module:
    """A copy with the dequantized weights as dense parameters, computed by the architecture's own loop."""
    twin = copy.deepcopy(model)
    for name, stack in [(n, m) for n, m in twin.named_modules() if isinstance(m, QuantizedStack)]:
        parent, _, parameter = name.rpartition(".")
        put_dense(twin.get_submodule(parent), parameter, nn.Parameter(stack.dequantize()))
    twin.set_experts_implementation("eager")
    assert not any(isinstance(module, QuantizedStack) for module in twin.modules())
    return twin


def results(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of the embeddings' output."""
    model.zero_grad()
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=x, use_cache=False).logits
    logits.float().square().mean().backward()
    return logits.detach(), x.grad


# ----- the product -----


@pytest.mark.parametrize("is_transposed", [False, True])
@all_methods
def test_sorted_tokens_meet_their_own_expert(method, is_transposed):
    stack = make_stack(method, is_transposed=is_transposed)
    x = torch.randn(9, 48, requires_grad=True)
    dense = [stack.dequantize_expert(e) for e in range(3)]
    y, expected = stack(x, [4, 0, 5]), torch.cat([x[:4] @ dense[0].t(), x[4:] @ dense[2].t()])
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(y)
    (found,), (wanted,) = (torch.autograd.grad(each, x, grad) for each in (y, expected))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
def test_halves_err_no_more_than_twice_as_much_as_dense_halves(nbits):
    """On a CPU with AMX, all experts in one call, but for 8 bits."""
    torch.manual_seed(2)
    spec, counts = HQQSpec(nbits=nbits, group_size=64), [5, 0, 40, 1]
    quantized = quantized_experts(torch.randn(4, 96, 128), 4, spec, layer_name="experts.up")
    stack = QuantizedStack(quantized, compute_dtype=torch.bfloat16, layer_name="experts.up")
    x, grad = torch.randn(sum(counts), 128).bfloat16().requires_grad_(), torch.randn(sum(counts), 96).bfloat16()

    def dense(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        its = x.detach().to(dtype).requires_grad_()
        parts = zip(its.split(counts), stack.dequantize(torch.float32), strict=True)
        y = torch.cat([part @ weight.to(dtype).t() for part, weight in parts])
        return y.detach(), torch.autograd.grad(y, its, grad.to(dtype))[0]

    y = stack(x, counts)
    assert y.dtype == torch.bfloat16
    found = y.detach(), torch.autograd.grad(y, x, grad)[0]
    for ours, plain, truth in zip(found, dense(torch.bfloat16), dense(torch.float64), strict=True):
        assert (ours.double() - truth).norm() <= 2 * (plain.double() - truth).norm()


def test_no_tokens_and_wrong_counts():
    stack = make_stack()
    assert stack(torch.randn(0, 48), [0, 0, 0]).shape == (0, 8)
    for counts in ([4, 5], [4, 4, 4]):
        with pytest.raises(ValueError, match="do not fit the counts"):
            stack(torch.randn(9, 48), counts)
    with pytest.raises(ValueError, match="expected a floating input"):
        stack(torch.randn(9, 47), [9, 0, 0])


@pytest.mark.parametrize("family", sorted(MIXTURES))
@pytest.mark.parametrize("implementation", ["quantlayers", "eager"])
def test_every_family_computes_as_with_the_dequantized_weights(family, implementation):
    model = tiny_mixture(family)
    names = quantize_all(model)
    assert names
    twin = dense_twin(model)
    declares_the_interface = family not in ("llama4", "longcat_flash", "jetmoe")
    assert (model.config._experts_implementation == "quantlayers") == declares_the_interface
    model.set_experts_implementation(implementation)
    (logits, grad), (expected, expected_grad) = results(model), results(twin)
    assert (logits - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max()))
    assert (grad - expected_grad).norm() <= 2e-5 * expected_grad.norm()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_one_dense_parameter_beside_a_stack_computes_too(family):
    model = tiny_mixture(family)
    twin = copy.deepcopy(model)
    twin.set_experts_implementation("eager")
    name = next(name for name, _, _ in dense_stacks(model) if name.endswith("down_proj"))
    stack = quantize_stack(model, name, SPEC)
    parent, _, parameter = name.rpartition(".")
    put_dense(twin.get_submodule(parent), parameter, nn.Parameter(stack.dequantize()))
    torch.testing.assert_close(model(IDS).logits, twin(IDS).logits, atol=1e-6, rtol=1e-6)


def test_an_implementation_that_wants_dense_weights_is_refused_with_the_way_out():
    for implementation in ("grouped_mm", "batched_mm"):
        model = tiny_mixture("qwen3_moe")
        quantize_all(model)
        model.set_experts_implementation(implementation)
        with pytest.raises(NotImplementedError, match=r"set_experts_implementation\(\"quantlayers\"\)"):
            model(IDS)


def test_experts_spread_over_processes_are_refused():
    model = tiny_mixture("qwen3_moe")
    quantize_all(model)
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(NotImplementedError, match="expert parallelism"):
        model(IDS)


def test_experts_that_are_spread_over_processes_already_are_not_quantized():
    model = tiny_mixture("qwen3_moe")
    for block in model.model.layers:
        block.mlp.experts._is_expert_parallel = True
    config = pql.HQQConfig(group_size=16)
    with pytest.raises(ValueError, match=r"experts.gate_up_proj: .*expert parallelism.*without ep_size.*skip_modules"):
        pql.quantize_model(model, config, progress=False)
    assert not any(isinstance(module, QuantizedStack) for module in model.modules())
    pql.quantize_model(model, dataclasses.replace(config, skip_modules=("experts",)), progress=False)


@pytest.mark.parametrize(
    ("is_quantizing", "said"), [(True, "while quantizing"), (False, "is not supported for quantized")]
)
def test_expert_parallel_loading_is_refused_with_the_way_that_works(is_quantizing, said):
    config = SimpleNamespace(distributed_config=SimpleNamespace(ep_size=2, fsdp_size=None))
    with pytest.raises(ValueError, match=said) as error:
        refuse_parallel_loading(config, is_quantizing=is_quantizing)
    assert "expert parallelism (ep_size=2)" in str(error.value)
    assert "fsdp_size" in str(error.value)


def test_autocast_decides_the_dtype():
    stack, x = make_stack(), torch.randn(5, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = stack(x, [5, 0, 0])
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), x @ stack.dequantize_expert(0).t(), atol=0.1, rtol=0.05)


# ----- reading one expert -----


@pytest.mark.parametrize("is_transposed", [False, True])
@all_methods
def test_a_view_multiplies_without_being_dequantized_whole(method, is_transposed, monkeypatch):
    stack, x = make_stack(method, is_transposed=is_transposed), torch.randn(5, 48, requires_grad=True)
    dense, bias = stack.dequantize_expert(1), torch.randn(8)
    view = stack[torch.tensor(1)]
    monkeypatch.setattr(type(stack), "dequantize_expert", None)
    y = x @ view if is_transposed else F.linear(x, view, bias)
    expected = x @ dense.t() if is_transposed else F.linear(x, dense, bias)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], dense.sum(0).expand(5, -1), atol=1e-5, rtol=1e-5)
    assert view._dense is None


def test_a_view_reads_as_the_dense_weight_in_any_other_use():
    for is_transposed in (False, True):
        stack = make_stack(is_transposed=is_transposed)
        dense = stack.dequantize()
        assert stack.shape == dense.shape == torch.Size((3, 48, 8) if is_transposed else (3, 8, 48))
        assert stack.ndim == stack.dim() == 3
        assert stack.dtype == torch.float32
        assert stack.numel() == dense.numel()
        assert (stack.size(0), len(stack)) == (3, 3)
        for expert in (0, -1, torch.tensor(2)):
            assert stack[expert].shape == dense[0].shape
            assert torch.equal(stack[expert] + 0, dense[expert])
            torch.testing.assert_close(stack[expert].t() @ torch.ones(stack.shape[1]), dense[expert].sum(0))
            assert float(stack[expert].norm()) == float(dense[expert].norm())


def test_a_stack_reads_one_expert_at_a_time():
    stack = make_stack()
    with pytest.raises(IndexError, match="expert 3 of 3"):
        stack[3]
    for index in (slice(0, 2), torch.tensor([0, 1]), [0]):
        with pytest.raises(NotImplementedError, match="several experts' dense weights at once"):
            stack[index]
    with pytest.raises(NotImplementedError, match=r"wants the dense weights of all experts"):
        torch.einsum("sd,ehd->seh", torch.randn(2, 48), stack)


# ----- writing -----


def test_a_write_to_one_expert_reaches_it_and_no_other():
    for is_transposed in (False, True):
        stack = make_stack(is_transposed=is_transposed)
        before = stack.quantized_weight
        stack[1].data.mul_(2)
        after = stack.quantized_weight
        for expert in (0, 2):
            for name, tensor in before[expert].tensors.items():
                assert torch.equal(tensor, after[expert].tensors[name])
        method = get_method("hqq")
        found, wanted = method.dequantize(after[1]), 2 * method.dequantize(before[1])
        assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_metadata_that_float16_cannot_hold_widen_the_whole_stack_and_change_no_other_expert():
    stack = make_stack()
    others = [stack.dequantize_expert(e) for e in (0, 2)]
    stack.write_expert(1, torch.randn(8, 48) * 1e-9)
    assert stack.spec == SPEC.widened()
    assert stack.scale.dtype == torch.float32
    assert [torch.equal(a, stack.dequantize_expert(e)) for a, e in zip(others, (0, 2), strict=True)] == [True, True]
    assert stack.dequantize_expert(1).abs().max() < 1e-7


def test_a_wrong_write_leaves_the_stack_as_it_was():
    stack = make_stack()
    before = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    for weight, said in (
        (torch.randn(8, 47), "cannot write a weight of shape"),
        (torch.full((8, 48), torch.nan), "NaN"),
    ):
        with pytest.raises(ValueError, match=said):
            stack.write_expert(0, weight)
    for name, tensor in stack.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_fused_parameter_takes_the_place_of_its_stack_again():
    model = tiny_mixture("gpt_oss")
    first = list(model.state_dict())
    names = quantize_all(model)
    twin = dense_twin(model)
    assert list(twin.state_dict()) == first
    module = model.get_submodule(names[0].rpartition(".")[0])
    module.gate_up_proj = nn.Parameter(torch.zeros(4, 64, 64))
    assert type(module.gate_up_proj) is nn.Parameter


# ----- the module -----


@all_methods
def test_copies_pickles_and_states_are_the_same_stack(method):
    stack = make_stack(method, is_transposed=True)
    other = make_stack(method, is_transposed=True)
    with torch.no_grad():
        other.write_expert(0, torch.randn(8, 48))
    other.load_state_dict(stack.state_dict())
    buffer = io.BytesIO()
    torch.save(stack, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(stack), pickle.loads(pickle.dumps(stack)), torch.load(buffer, weights_only=False), other,
    ]  # fmt: skip
    for twin in copies:
        assert twin.spec == stack.spec
        assert torch.equal(twin.dequantize(), stack.dequantize())
        assert (twin.n_experts, twin.shape, twin.is_transposed) == (3, stack.shape, True)
    copies[0].write_expert(0, torch.randn(8, 48))
    assert not torch.equal(copies[0].dequantize(), stack.dequantize())


def test_a_change_of_dtype_leaves_codes_and_metadata():
    stack = make_stack()
    dtypes = {name: tensor.dtype for name, tensor in stack.state_dict().items()}
    dense = stack.dequantize(torch.float32)
    stack.to(torch.bfloat16)
    assert stack.dtype == torch.bfloat16
    assert {name: tensor.dtype for name, tensor in stack.state_dict().items()} == dtypes
    assert torch.equal(stack.dequantize(torch.float32), dense)
    assert stack.to("meta").device.type == "meta"


def test_weights_are_counted_and_shown():
    stack = make_stack()
    assert sum(parameter.numel() for parameter in stack.parameters()) == 3 * 8 * 48
    assert "n_experts=3, in_features=48, out_features=8, method='hqq', nbits=4" in repr(stack)
    assert 4 < stack.bits_per_weight < 8
    assert not any(parameter.requires_grad for parameter in stack.parameters())
    with pytest.raises(NotImplementedError, match="takes no gradient"):
        stack.requires_grad_(True)


def test_a_stack_takes_one_leading_dimension_and_a_weight_that_fits():
    stack = make_stack()
    with pytest.raises(ValueError, match="does not fit"):
        stack.quantized_weight = stack.quantized_weight[0]
    with pytest.raises(ValueError, match="one leading dimension"):
        QuantizedStack(stack.quantized_weight[0], compute_dtype=torch.float32)


def test_the_broken_expert_is_named():
    weights = torch.randn(3, 8, 48)
    weights[1, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"experts\.up: .*NaN or Inf.*\(Expert 1\.\)"):
        quantized_experts(weights, 3, SPEC, layer_name="experts.up")


def test_all_fused_weights_of_a_model_are_found_in_both_orientations():
    found = {name: entry for name, _, entry in dense_stacks(tiny_mixture("gpt_oss"))}
    assert found["model.layers.0.mlp.experts.gate_up_proj"] == FusedWeight(
        parameter="gate_up_proj", is_transposed=True
    )
    assert len(found) == 4
    assert not list(dense_stacks(nn.Linear(3, 3)))


def test_weights_are_stacked_one_at_a_time_with_the_widest_metadata():
    method = get_method("hqq")
    weights = [torch.randn(8, 48), torch.randn(8, 48) * 1e-9, torch.randn(8, 48)]
    quantized = [method.quantize(weight, SPEC) for weight in weights]
    assert [each.spec == SPEC for each in quantized] == [True, False, True]
    stack = QuantizedWeight.stacked(iter(quantized), 3)
    assert stack.spec == SPEC.widened()
    stack.check("stack")
    for expert, each in enumerate(quantized):
        assert torch.equal(method.dequantize(stack[expert]), method.dequantize(each))


def test_put_stack_keeps_the_mode_and_the_order_of_parameters():
    module = tiny_mixture("gpt_oss").train().model.layers[0].mlp.experts
    order = list(module._parameters)
    for entry in (
        FusedWeight(parameter="down_proj", is_transposed=True),
        FusedWeight(parameter="gate_up_proj", is_transposed=True),
    ):
        dense = entry.weight(module).detach()
        quantized = quantized_experts(dense, len(dense), SPEC, layer_name="x")
        stack = put_stack(module, entry, quantized, name="x", compute_dtype=torch.float32)
        assert stack.training
        assert list(stack.parameter_order) == order
