"""LoRA on quantized layers through plain PEFT: the numbers against the same adapter on the dequantized dense layer."""

import copy

import peft
import pytest
import torch
from every_method import all_methods
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig, LoraQuantizedLinear, QuantizedLinear
from peft_quantlayers.evaluate import saved_for_backward

from .surfaces import Two, assert_same_gradient, quantized


def quantized_two(nbits: int = 4) -> Two:
    torch.manual_seed(0)
    return pql.quantize_model(Two(), HQQConfig(nbits=nbits, group_size=32), progress=False)


def with_adapter(model: nn.Module, **fields) -> PeftModel:
    torch.manual_seed(1)
    fields = {"r": 4, "target_modules": ["first", "second"], "init_lora_weights": False} | fields
    return get_peft_model(model, LoraConfig(**fields))


def bits_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}


def assert_same_bits(model: nn.Module, bits: dict[str, torch.Tensor]) -> None:
    now = bits_of(model)
    assert now.keys() == bits.keys()
    for name in bits:
        assert torch.equal(now[name], bits[name]), name


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(2))


def test_plain_get_peft_model_wraps_every_quantized_layer():
    model = with_adapter(quantized_two(), target_modules="all-linear")
    for name in ("first", "second"):
        layer = getattr(model.base_model.model, name)
        assert type(layer) is LoraQuantizedLinear
        assert isinstance(layer.get_base_layer(), QuantizedLinear)
    assert {status.quantization_backend for status in model.get_layer_status()} == {"quantlayers-hqq"}


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}, {"rank_pattern": {"first": 2}}],
    ids=["vanilla", "rslora", "dora", "lora_bias", "rank_pattern"],
)
def test_outputs_and_gradients_equal_those_on_the_dequantized_dense_model(fields, x):
    model = with_adapter(quantized_two(), **fields)
    dense = with_adapter(pql.dequantize_model(quantized_two()), **fields)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [name for name, parameter in dense.named_parameters() if parameter.requires_grad]
    for candidate in (model, dense):
        candidate(x).square().sum().backward()
    torch.testing.assert_close(model(x), dense(x))
    ours, reference = dict(model.named_parameters()), dict(dense.named_parameters())
    for name in trained:
        assert_same_gradient(ours[name].grad, reference[name].grad)


@all_methods
@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.0), (torch.bfloat16, 0.0), (torch.bfloat16, 0.1)])
def test_the_backward_pass_keeps_the_input_once_the_hidden_state_and_a_boolean(method, dtype, dropout):
    model = quantized(method).to(dtype)
    layer = with_adapter(model, r=16, lora_dropout=dropout, target_modules=["first"]).base_model.model.first.train()
    layer.lora_A.float()
    layer.lora_B.float()
    x = torch.randn(512, 64, dtype=dtype, requires_grad=True)
    floor = x.nbytes + 512 * 16 * 4 + (x.numel() if dropout else 0)
    assert saved_for_backward(layer, x) <= 1.1 * floor


def test_the_meta_device_and_functorch_transforms_work_as_with_peft(x):
    model = with_adapter(quantized_two(), target_modules=["first"])
    layer = model.base_model.model.first
    mapped = torch.func.vmap(lambda row: layer(row[None])[0])(x)
    torch.testing.assert_close(mapped, layer(x))
    assert with_adapter(quantized_two()).to("meta")(x.to("meta")).shape == (5, 64)


def test_layers_that_share_their_input_keep_it_once():
    class Projections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(64, 64, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) + self.k(x) + self.v(x)

    base = pql.quantize_model(Projections(), HQQConfig(nbits=4, group_size=32), progress=False).to(torch.bfloat16)
    model = with_adapter(base, r=16, target_modules=["q", "k", "v"])
    x = torch.randn(512, 64, dtype=torch.bfloat16, requires_grad=True)
    assert saved_for_backward(model, x) <= 1.1 * (x.nbytes + 3 * 512 * 16 * 4)


def test_hooks_and_wrapped_matrices_of_an_adapter_are_called_as_by_peft(x):
    model = with_adapter(quantized_two(), target_modules=["first"])
    expected, layer = model(x), model.base_model.model.first
    calls = []
    handle = layer.lora_A["default"].register_forward_hook(lambda *args: calls.append(1))
    torch.testing.assert_close(model(x), expected)
    assert calls == [1]
    handle.remove()

    A = layer.lora_A["default"]
    A.forward = lambda x: calls.append(2) or nn.Linear.forward(A, x)
    torch.testing.assert_close(model(x), expected)
    assert calls == [1, 2]
    del A.forward

    handle = register_module_forward_hook(lambda module, *args: calls.append(module))
    torch.testing.assert_close(model(x), expected)
    handle.remove()
    assert {A, layer.get_base_layer()} <= set(calls[2:])

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layer.lora_B["default"].__class__ = Doubled
    assert not torch.allclose(model(x), expected)


def test_the_percentage_of_trainable_parameters_counts_weights_and_not_bytes():
    trainable, total = with_adapter(quantized_two()).get_nb_trainable_parameters()
    dense_trainable, dense_total = with_adapter(Two()).get_nb_trainable_parameters()
    assert (trainable, total) == (dense_trainable, dense_total)


def test_adapters_switch_and_disabling_gives_back_the_base(x):
    base = quantized_two()
    reference = base(x)
    model = with_adapter(base)
    first = model(x)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    model.set_adapter("other")
    assert not torch.allclose(model(x), first)
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    with model.disable_adapter():
        assert torch.equal(model(x), reference)
    model.delete_adapter("other")
    assert torch.equal(model(x), first)


def test_a_mixed_batch_gives_each_row_its_own_adapter():
    torch.manual_seed(0)
    model = with_adapter(quantized_two())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    model.eval()
    x = torch.randn(3, 64)
    mixed = model(x, adapter_names=["default", "__base__", "other"])
    torch.testing.assert_close(mixed[0], model(x[:1])[0])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], model(x[1:2])[0])
    model.set_adapter("other")
    torch.testing.assert_close(mixed[2], model(x[2:])[0])


def test_an_adapter_saves_and_loads_onto_a_fresh_quantized_model(x, tmp_path):
    model = with_adapter(quantized_two())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized_two(), tmp_path)
    assert type(loaded.base_model.model.first) is LoraQuantizedLinear
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("use_dora", [False, True], ids=["vanilla", "dora"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_unmerge_restores_the_same_bits_ten_times_over(bias, use_dora, x):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 96, bias=bias), nn.ReLU(), nn.Linear(96, 64, bias=bias))
    model = with_adapter(
        pql.quantize_model(dense, HQQConfig(nbits=3, group_size=32), progress=False),
        target_modules=["0", "2"],
        use_dora=use_dora,
        lora_bias=bias and not use_dora,
    )
    bits, output = bits_of(model), model(x)
    for _ in range(10):
        model.merge_adapter()
        model.unmerge_adapter()
        assert_same_bits(model, bits)
    assert torch.equal(model(x), output)


def test_a_merged_eight_bit_layer_computes_what_base_and_adapter_did_and_keeps_its_bias(x):
    model = with_adapter(quantized_two(nbits=8))
    adapted = model(x)
    bias = model.base_model.model.first.base_layer.bias.clone()
    merged = model.merge_and_unload()
    assert type(merged.first) is pql.HQQLinear
    assert torch.equal(merged.first.bias, bias)
    assert (merged(x) - adapted).norm() < 0.01 * adapted.norm()


def test_merging_adapters_one_after_the_other_equals_merging_their_sum():
    def two_adapters() -> PeftModel:
        model = with_adapter(quantized_two())
        torch.manual_seed(3)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))
        return model

    in_turn, together = two_adapters(), two_adapters()
    for name in ("default", "other"):
        in_turn.merge_adapter([name])
    together.merge_adapter(["default", "other"])
    assert_same_bits(in_turn, bits_of(together))
    layer = in_turn.base_model.model.first
    assert layer.merged_adapters == ["default", "other"]

    target = layer.merge_report.weight_norm
    assert layer.merge_report.error_norm < 0.12 * target  # one rounding at 4 bits


def test_merging_what_is_merged_already_changes_nothing_and_says_so():
    model = with_adapter(quantized_two())
    model.merge_adapter()
    bits = bits_of(model)
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        model.merge_adapter()
    assert_same_bits(model, bits)


def test_the_merged_weight_is_the_quantized_float_sum():
    model = with_adapter(quantized_two())
    layer = model.base_model.model.first
    base = layer.get_base_layer()
    target = base.dequantize(torch.float32) + layer.get_delta_weight("default").detach()
    expected = base.method.quantize(target, base.spec)
    layer.merge()
    for name, tensor in expected.tensors.items():
        assert torch.equal(base.quantized_weight.tensors[name], tensor)


def test_a_zero_adapter_merges_with_no_delta_retained_to_report():
    model = with_adapter(quantized_two(nbits=8), init_lora_weights=True)
    layer = model.base_model.model.first
    layer.merge()
    assert layer.merge_report.delta_norm == 0.0
    assert layer.merge_report.delta_retained == 1.0


def test_disabling_a_merged_adapter_gives_the_base_bit_for_bit(x):
    base = quantized_two()
    reference = base(x)
    model = with_adapter(base)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), reference)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_broken_adapter_is_refused_with_the_layers_name_and_the_layer_left_as_it_was(safe_merge):
    model = with_adapter(quantized_two())
    model.base_model.model.second.lora_A["default"].weight.data[0, 0] = float("nan")
    bits = bits_of(model.base_model.model.second)
    with pytest.raises(ValueError, match="second"):
        model.base_model.model.second.merge(safe_merge=safe_merge)
    assert_same_bits(model.base_model.model.second, bits)
    assert not model.base_model.model.second.merged


def test_a_merged_model_copies_and_unmerges_on_its_own():
    model = with_adapter(quantized_two())
    bits = bits_of(model)
    model.merge_adapter()
    copied = copy.deepcopy(model)
    copied.unmerge_adapter()
    assert_same_bits(copied, bits)
    assert model.base_model.model.first.merged


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_initialisers_that_move_weight_into_the_adapter_requantize_the_residual(init, x):
    base = quantized_two(nbits=8)
    reference, bits = base(x), bits_of(base)
    model = with_adapter(base, init_lora_weights=init)
    assert not torch.equal(model.base_model.model.first.base_layer.W_q, bits["first.W_q"])
    assert (model(x) - reference).norm() < 0.02 * reference.norm()


def test_fan_in_fan_out_is_switched_off_with_a_warning():
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = with_adapter(quantized_two(), fan_in_fan_out=True)
    assert model.base_model.model.first.fan_in_fan_out is False


def test_loftq_is_refused_with_the_way_out():
    pytest.importorskip("scipy", reason="PEFT itself refuses LoftQ without scipy")
    with pytest.raises(NotImplementedError, match=r"first: .*initialize_loftq.*pissa"):
        with_adapter(quantized_two(), init_lora_weights="loftq", loftq_config={"loftq_bits": 4})


def test_naming_the_weight_in_target_parameters_is_refused():
    with pytest.raises(ValueError, match="target_modules"):
        with_adapter(quantized_two(), target_modules=[], target_parameters=["first.weight"])


def test_unregister_restores_pefts_own_dispatch_and_register_is_idempotent():
    ours = peft.tuners.lora.LoraModel.__dict__["_create_new_module"]
    pql.register()
    assert peft.tuners.lora.LoraModel.__dict__["_create_new_module"] is ours
    pql.unregister()
    try:
        assert peft.tuners.lora.LoraModel._create_new_module.__module__ == "peft.tuners.lora.model"
        assert peft.tuners.lora.loraga.estimate_gradients.__module__ == "peft.tuners.lora.loraga"
        assert type(with_adapter(quantized_two()).base_model.model.first) is peft.tuners.lora.Linear
    finally:
        pql.register()
    assert type(with_adapter(quantized_two()).base_model.model.first) is LoraQuantizedLinear


def test_a_registry_of_dispatchers_is_used_where_peft_has_one(monkeypatch):
    registry = {}
    pql.unregister()
    unwrapped = peft.tuners.lora.LoraModel.__dict__.get("_create_new_module")
    try:
        with monkeypatch.context() as patched:
            lora = peft.tuners.lora
            patched.setattr(lora, "register_lora_dispatcher", registry.__setitem__, raising=False)
            patched.setattr(lora, "unregister_lora_dispatcher", registry.pop, raising=False)
            pql.register()
            assert lora.LoraModel.__dict__["_create_new_module"] is unwrapped
            (dispatch,) = registry.values()
            config = LoraConfig(r=2, target_modules=["first"])
            layer = dispatch(quantized_two().first, "default", config=config, r=2, lora_alpha=2)
            assert type(layer) is LoraQuantizedLinear
            assert dispatch(nn.Linear(4, 4), "default", config=config, r=2, lora_alpha=2) is None
            pql.unregister()
            assert registry == {}
    finally:
        pql.register()
    assert type(with_adapter(quantized_two()).base_model.model.first) is LoraQuantizedLinear


def test_a_users_own_custom_module_goes_before_ours():
    class Mine(LoraQuantizedLinear):
        pass

    config = LoraConfig(r=2, target_modules=["first"])
    config._register_custom_module({pql.HQQLinear: Mine})
    assert type(get_peft_model(quantized_two(), config).base_model.model.first) is Mine


def test_a_mixed_model_and_a_direct_lora_model_use_the_dispatch_too():
    config = LoraConfig(r=2, target_modules=["first"])
    mixed = get_peft_model(quantized_two(), config, mixed=True)
    assert type(mixed.base_model.model.first) is LoraQuantizedLinear
    direct = peft.LoraModel(quantized_two(), config, "default")
    assert type(direct.model.first) is LoraQuantizedLinear


def test_a_write_to_a_merged_weight_stays_when_the_adapter_is_unmerged_or_another_is_merged():
    model = with_adapter(quantized_two(nbits=8), use_dora=True)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    layer = model.base_model.model.first
    base = layer.get_base_layer()
    before = base.dequantize()
    layer.merge(adapter_names=["default"])
    base.weight.data += 1.0
    layer.merge(adapter_names=["other"])
    layer.unmerge()
    error = (base.dequantize() - (before + 1.0)).norm()
    assert error < 0.03 * before.norm() + 0.01 * (before + 1.0).norm()
    assert not layer.merged
    layer.merge(adapter_names=["default"])  # and from here on the bits are kept again
    layer.unmerge()
    written = base.quantized_weight.tensors["W_q"].clone()
    layer.merge(adapter_names=["default"])
    layer.unmerge()
    assert torch.equal(base.quantized_weight.tensors["W_q"], written)


def test_lora_over_another_tuner_of_a_mixed_model_merges_and_unmerges_beside_it(x):
    def mixed(base: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        model = get_peft_model(base, peft.LoHaConfig(r=2, target_modules=["first"], init_weights=False), mixed=True)
        model.add_adapter("lora", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
        model.set_adapter(["default", "lora"])
        return model

    model, dense = mixed(quantized_two(nbits=8)), mixed(pql.dequantize_model(quantized_two(nbits=8)))
    lora = model.base_model.model.first
    assert type(lora) is LoraQuantizedLinear
    assert type(lora.base_layer) is peft.tuners.loha.Linear
    torch.testing.assert_close(model(x), dense(x))
    expected = dense(x)
    model.merge_adapter()
    assert type(lora.base_layer) is peft.tuners.loha.Linear
    assert (model(x) - expected).norm() < 0.02 * expected.norm()
    model.unmerge_adapter()
    assert (model(x) - expected).norm() < 0.02 * expected.norm()


def test_adapters_on_a_dequantized_base_still_merge(x):
    model = with_adapter(quantized_two())
    expected = model(x)
    pql.dequantize_model(model)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)
