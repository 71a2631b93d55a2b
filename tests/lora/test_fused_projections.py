"""Layers that share their input, computed together: the numbers of layers computed alone, whatever happens between."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from every_method import all_methods
from integrations.tiny import token_ids
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig
from peft_quantlayers.evaluate import saved_for_backward
from peft_quantlayers.layers import shared_results
from peft_quantlayers.lora import fused_projections as projections
from peft_quantlayers.lora import layer as lora

from .surfaces import assert_same_gradient, quantized


class Attention(nn.Module):
    """Projections under the names that transformers gives them."""

    order = "qkv"

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(64, 96), nn.Linear(64, 32), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, f"{name}_proj")(x) for name in self.order], -1)


def attention(**fields) -> PeftModel:
    torch.manual_seed(0)
    model = pql.quantize_model(Attention(), HQQConfig(nbits=4, group_size=32), progress=False)
    torch.manual_seed(1)
    fields = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | fields
    return get_peft_model(model, LoraConfig(**fields))


def parts(model: PeftModel) -> tuple[nn.Module, ...]:
    inner = model.base_model.model
    return inner.q_proj, inner.k_proj, inner.v_proj


@pytest.fixture(autouse=True)
def _experimental_is_known(caplog) -> None:
    """Other tests look at other warnings."""
    projections._warn_that_it_is_experimental()
    caplog.clear()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many layers each call computed."""
    counted: list[int] = []

    def counting(x, layers):
        counted.append(len(layers))
        return real(x, layers)

    real = lora.lora_linears
    for module in (lora, projections):
        monkeypatch.setattr(module, "lora_linears", counting)
    return counted


def loss_and_gradients(model: nn.Module) -> list[Tensor]:
    loss = model(input_ids=token_ids(), labels=token_ids()).loss
    loss.backward()
    return [loss.detach(), *[p.grad for p in model.parameters() if p.grad is not None]]


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["all kept", "reentrant", "not reentrant"])
@all_methods
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_language_model_has_the_same_loss_and_gradients(method, checkpointing, dropout, calls):
    found = []
    for is_fused in (False, True):
        model = quantized(method, "llama")
        model.enable_input_require_grads()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout)
        model = get_peft_model(model, config).train()
        if is_fused:
            groups = pql.fuse_projections(model)
            assert [[name.rpartition(".")[2] for name in group] for group in groups[:2]] == [
                ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"],
            ]  # fmt: skip
            assert len(groups) == 2 * model.config.num_hidden_layers
        calls.clear()
        torch.manual_seed(2)  # of dropout
        found.append(loss_and_gradients(model))
        separate, together = [1] * 7, [3, 1, 2, 1]
        # The first of two passes through reentrant checkpoints takes no gradients; dropout must draw alike in both.
        # Without either, layers add their adapters in place, with no such call.
        each = together if is_fused else separate
        expected = {None: [each], True: [each if dropout else [], each], False: [each, each]}[checkpointing]
        assert calls == [n for each in expected for _ in range(model.config.num_hidden_layers) for n in each]
    for fused, alone in zip(found[1], found[0], strict=True):
        assert_same_gradient(fused, alone)


def test_what_is_kept_for_the_backward_pass_is_the_input_once_and_the_hidden_states():
    model = attention(r=16).to(torch.bfloat16)
    for layer in parts(model):
        layer.lora_A.float()
        layer.lora_B.float()
    pql.fuse_projections(model)
    x = torch.randn(512, 64, dtype=torch.bfloat16, requires_grad=True)
    assert saved_for_backward(model, x) <= 1.1 * (x.nbytes + 3 * 512 * 16 * 4)


@pytest.mark.parametrize("order", ["qkv", "kvq", "vqk"])
def test_both_passes_of_a_checkpoint_drop_the_same_numbers_whatever_the_order(order, x):
    found = []
    for use_reentrant in (False, True):
        model = attention(lora_dropout=0.3).train()
        model.base_model.model.order = order
        pql.fuse_projections(model)
        inner = model.base_model.model
        start = x.clone().requires_grad_()
        torch.manual_seed(3)
        y = checkpoint(lambda x, inner=inner: inner(x).sin(), start, use_reentrant=use_reentrant)
        y.square().sum().backward()
        found.append([y.detach(), start.grad, *[p.grad for p in model.parameters() if p.grad is not None]])
    for reentrant, other in zip(*found, strict=True):
        torch.testing.assert_close(reentrant, other)


def test_only_neighbours_with_adapters_are_fused_and_skipped_ones_are_not(x, calls):
    model = attention(target_modules=["q_proj", "v_proj"])
    assert pql.fuse_projections(model) == [("base_model.model.q_proj", "base_model.model.v_proj")]
    assert pql.fuse_projections(attention(target_modules=["q_proj"])) == []
    every = tuple(f"base_model.model.{name}_proj" for name in "qkv")
    assert pql.fuse_projections(model, in_inference=True) == [every]
    assert pql.fuse_projections(model, ()) == []  # without adapters too
    assert all(layer.shared_product is None for layer in pql.quantized_modules(model).values())
    assert pql.fuse_projections(model, in_inference=True) == [every]
    model(x)
    assert calls == [2]  # and the base of k alone
    calls.clear()
    model = attention()
    assert pql.fuse_projections(model, skip=["q_proj"]) == [("base_model.model.k_proj", "base_model.model.v_proj")]
    expected = model(x)
    assert calls == [1, 2]
    assert pql.fuse_projections(model, groups=()) == []
    torch.testing.assert_close(model(x), expected)
    assert calls == [1, 2, 1, 1, 1]
    assert pql.fuse_projections(model, groups=[("v_proj", "k_proj"), ("q_proj", "k_proj")]) == [
        ("base_model.model.v_proj", "base_model.model.k_proj")
    ]


def test_layers_of_different_input_sizes_are_not_fused():
    dense = nn.ModuleDict({"q_proj": nn.Linear(64, 32), "k_proj": nn.Linear(32, 32)})
    model = pql.quantize_model(dense, HQQConfig(nbits=4, group_size=32), progress=False)
    assert pql.fuse_projections(get_peft_model(model, LoraConfig(target_modules=["q_proj", "k_proj"]))) == []


def test_a_model_without_our_layers_is_refused():
    with pytest.raises(ValueError, match=r"no LoRA adapter on a quantized layer.*Call get_peft_model first"):
        pql.fuse_projections(Attention())
    with pytest.raises(ValueError, match=r"no quantized layer.*Call quantize_model first"):
        pql.fuse_projections(Attention(), in_inference=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": ("q_proj", "k_proj")}, "groups must be several names"),
        ({"groups": "q_proj"}, "groups must be several names"),
        ({"groups": None}, "groups must be several names"),
        ({"skip": "k_proj"}, "skip must be several names"),
    ],
)
def test_a_name_in_place_of_several_is_refused_and_what_is_fused_stays(arguments, message):
    model = attention()
    pql.fuse_projections(model)
    with pytest.raises(TypeError, match=message):
        pql.fuse_projections(model, **arguments)
    assert all(layer.shared_input is not None for layer in parts(model))


def test_that_it_is_experimental_is_said_once(caplog):
    projections._warn_that_it_is_experimental.cache_clear()
    model = attention()
    pql.fuse_projections(model, ())
    assert not caplog.records
    pql.fuse_projections(model)
    pql.fuse_projections(model)
    assert [record.message.partition(":")[0] for record in caplog.records] == ["fuse_projections is experimental"]


def test_finding_nothing_is_said_and_attention_to_an_encoder_is_left_alone(caplog):
    model = attention()
    assert pql.fuse_projections(model, groups=()) == []
    assert not caplog.records
    assert pql.fuse_projections(model, groups=[("to_q", "to_k")]) == []
    assert "nothing was fused" in caplog.text
    dense = nn.ModuleDict({"encoder_attn": Attention(), "self_attn": Attention()})
    model = pql.quantize_model(dense, HQQConfig(nbits=4, group_size=32), progress=False)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert [{name.split(".")[-2] for name in group} for group in pql.fuse_projections(model)] == [{"self_attn"}]


def alone(model: PeftModel, layer: nn.Module, x: Tensor) -> Tensor:
    """What the layer gives where nothing is fused."""
    kept, layer.shared_input = layer.shared_input, None
    try:
        return layer(x)
    finally:
        layer.shared_input = kept


def write_to_input(model: PeftModel, x: Tensor) -> None:
    x.mul_(2)


def step(model: PeftModel, x: Tensor) -> None:
    with torch.no_grad():
        for layer in parts(model):
            layer.lora_B["default"].weight.add_(1)


def scale(model: PeftModel, x: Tensor) -> None:
    for layer in parts(model):
        layer.set_scale("default", 5.0)


def switch(model: PeftModel, x: Tensor) -> None:
    torch.manual_seed(3)
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter("other")


def disable(model: PeftModel, x: Tensor) -> None:
    model.base_model.disable_adapter_layers()


def merge(model: PeftModel, x: Tensor) -> None:
    model.merge_adapter()


def write_to_bias(model: PeftModel, x: Tensor) -> None:
    with torch.no_grad():
        for layer in parts(model)[:2]:
            layer.get_base_layer().bias.add_(1)


def write_to_weight(model: PeftModel, x: Tensor) -> None:
    for layer in parts(model):
        layer.get_base_layer().weight = torch.ones(layer.out_features, layer.in_features)


@pytest.mark.parametrize(
    "change", [write_to_input, step, scale, switch, disable, merge, write_to_bias, write_to_weight]
)
def test_what_changes_between_two_of_a_group_is_seen(change, x):
    model = attention()
    pql.fuse_projections(model)
    q, k, _ = parts(model)
    before = alone(model, k, x)
    q(x)
    change(model, x)
    y = k(x)
    assert not torch.allclose(y, before)
    torch.testing.assert_close(y, alone(model, k, x))


def test_a_result_of_another_mode_is_not_used(x, calls):
    model = attention()
    pql.fuse_projections(model)
    q, k, _ = parts(model)
    expected = model(x).detach()
    with torch.no_grad():
        q(x)
    assert k(x).requires_grad
    q(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert k(x).dtype == torch.bfloat16
    calls.clear()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(model(x.clone()), expected)
    assert calls == []


def test_layers_that_read_something_else_are_right_and_the_waste_is_said_once(x, caplog):
    model = attention()
    expected = [layer(part) for layer, part in zip(parts(model), (x, x + 1, x + 1), strict=True)]
    pql.fuse_projections(model)
    for _ in range(3):
        found = [layer(part) for layer, part in zip(parts(model), (x, x + 1, x + 1), strict=True)]
        for y, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(y, truth)
    (record,) = caplog.records
    assert "fuse_projections(model, skip=['model', ...])" in record.message
    assert "model.q_proj, " in record.message


def test_what_waits_holds_no_graph_longer_than_to_the_next_layer(x):
    first, second = attention(), attention()
    for model in (first, second):
        pql.fuse_projections(model)
    start = x.clone().requires_grad_() * 1
    died = weakref.ref(start)
    parts(first)[0](start)  # and the pass ends here
    del start
    gc.collect()
    assert died() is not None
    with torch.no_grad():
        second(x)
    gc.collect()
    assert died() is None
    model = attention()
    pql.fuse_projections(model)
    model(x)
    assert shared_results._PENDING.waiting is None


def test_hooks_of_a_layer_or_its_base_are_called(x, calls):
    model = attention()
    expected = model(x)
    pql.fuse_projections(model)
    seen = []
    _, k, v = parts(model)
    k.get_base_layer().register_forward_hook(lambda *args: seen.append("base of k"))
    v.register_forward_pre_hook(lambda *args: seen.append("v"))
    calls.clear()
    torch.testing.assert_close(model(x), expected)
    assert seen == ["base of k", "v"]
    assert calls == [2]  # q and v


def test_adapters_of_several_kinds_are_right_beside_each_other(x):
    model = attention()
    model.add_adapter("dora", LoraConfig(r=2, use_dora=True, target_modules=["k_proj"], init_lora_weights=False))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "dora", "other"])
    expected = model(x)
    assert pql.fuse_projections(model)
    torch.testing.assert_close(model(x), expected)
    mixed = model.eval()(x, adapter_names=["default"] * 5)
    model.set_adapter("default")
    torch.testing.assert_close(mixed, model(x))


def test_copies_are_not_fused_and_compute_the_same(x, calls):
    model = attention()
    pql.fuse_projections(model)
    expected = model(x)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(layer.shared_input is None for layer in parts(made))
        torch.testing.assert_close(made(x), expected)
    shallow = copy.copy(parts(model)[0])  # as torch.nn.DataParallel makes its replicas
    calls.clear()
    torch.testing.assert_close(shallow(x), expected[:, :96])
    assert calls == [1]


def test_a_layer_that_was_taken_out_is_not_computed(x, calls):
    model = attention()
    pql.fuse_projections(model)
    expected = model(x)
    model.base_model.model.v_proj = nn.Identity()
    calls.clear()
    torch.testing.assert_close(model(x)[:, :128], expected[:, :128])
    assert calls == [2]
