"""Scale-only finetuning as a PEFT method: what is trained, saved, switched and merged, and what is refused."""

import copy
import json

import peft
import pytest
import torch
from every_method import METHODS, quick_config, quick_spec
from integrations.tiny import tiny_model, token_ids, training_arguments
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig, QuantScalesConfig

CONFIGS = {name: quick_config(name) for name in METHODS}
# By role, the names of the tensors that are trained with it.
TENSORS: dict[str, dict[str, set[str]]] = {name: {"biases": {"bias"}} for name in METHODS}
for name in METHODS:
    for tensor_name, role in quick_spec(name).trainable_roles(64, 64).items():
        TENSORS[name].setdefault(role, set()).add(tensor_name)
ALL = {name: (*TENSORS[name], "norms") for name in METHODS}
# What differs in kind: groups along the outputs.
CONFIGS["hqq-axis0"], ALL["hqq-axis0"] = HQQConfig(nbits=3, group_size=16, axis=0), ALL["hqq"]

every_config = pytest.mark.parametrize("method", CONFIGS)
every_method = pytest.mark.parametrize("method", METHODS)
pytestmark = pytest.mark.usefixtures("toy_method")


def _metadata(method: str) -> list[str]:
    """The tensors beside the codes."""
    spec = quick_spec(method)
    return [name for name in spec.tensor_layout(64, 64) if name != spec.codes_name]


def quantized(method: str = "hqq", dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_model()
    rotary = model.model.rotary_emb.inv_freq
    model.to(dtype)
    model.model.rotary_emb.inv_freq = rotary  # as a model loaded in this dtype has it
    return pql.quantize_model(model, CONFIGS[method], progress=False)


def tuned(base: nn.Module, train: tuple[str, ...] = ("scales",), **fields) -> PeftModel:
    return get_peft_model(base, QuantScalesConfig(train=train, **fields))


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=token_ids(), labels=token_ids()).loss


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


def train_steps(model: nn.Module, steps: int = 5, lr: float = 1e-2) -> tuple[float, float]:
    """Loss before and after a few steps of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    first = loss_of(model).item()
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return first, loss_of(model).item()


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == state.keys()
    for name, tensor in state.items():
        assert now[name].dtype == tensor.dtype, name
        assert torch.equal(now[name], tensor), name


def trained_kinds(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("method", "role"), [(m, role) for m, roles in TENSORS.items() for role in roles])
def test_one_role_trains_its_tensors_alone_and_lowers_the_loss(method, role):
    model = tuned(quantized(method), (role,))
    assert trained_kinds(model) == TENSORS[method][role]
    before = state_of(model)
    first, last = train_steps(model)
    assert last < first - 0.01
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed == trained
    assert all("quant_scales_tensors.default" in name for name in trained)
    n_layers = len(pql.quantized_modules(model)) if role != "biases" else 8  # of the tiny Llama, attention has them
    assert len(trained) == n_layers


def test_norms_train_weight_and_bias_of_all_norm_layers():
    model = tuned(quantized(), ("norms",))
    assert trained_kinds(model) == {"weight"}
    assert sum(p.requires_grad for p in model.parameters()) == 5
    first, last = train_steps(model)
    assert last < first - 0.01
    gpt2 = tuned(pql.quantize_model(tiny_model("gpt2"), HQQConfig(group_size=32), progress=False), ("norms",))
    assert trained_kinds(gpt2) == {"weight", "bias"}
    assert sum(p.requires_grad for p in gpt2.parameters()) == 10


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_adapter_changes_no_bit_and_its_copies_are_float32(method, dtype):
    base = quantized(method, dtype)
    expected = logits_of(base)
    model = tuned(base, ALL[method])
    assert torch.equal(logits_of(model), expected)
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@every_config
def test_the_file_holds_the_tuned_tensors_and_gives_back_the_same_logits(method, tmp_path):
    model = tuned(quantized(method), ALL[method])
    train_steps(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    expected = {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if "quant_scales_tensors" in name
    }
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) and saved[name].dtype == torch.float32 for name in saved)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "QUANT_SCALES"
    loaded = PeftModel.from_pretrained(quantized(method), tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    again = PeftModel.from_pretrained(quantized(method), tmp_path, is_trainable=True)
    assert trained_kinds(again) == trained_kinds(model)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_onto_a_bfloat16_base_rounds_nothing(low_cpu_mem_usage, tmp_path):
    model = tuned(quantized("hqq", torch.bfloat16), ALL["hqq"])
    train_steps(model)
    model.save_pretrained(tmp_path)
    base = quantized("hqq", torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same_state(loaded, state_of(model))
    assert torch.equal(logits_of(loaded), logits_of(model))


@every_config
def test_adapters_switch_and_disabling_gives_the_base_bit_for_bit(method):
    base = quantized(method)
    reference = logits_of(base)
    model = tuned(base, ALL[method])
    train_steps(model)
    first = logits_of(model)
    model.add_adapter("other", QuantScalesConfig(target_modules=["q_proj", "up_proj"]))
    assert torch.equal(logits_of(model), first)
    model.set_adapter("other")
    assert torch.equal(logits_of(model), reference)
    train_steps(model, steps=2)
    second = logits_of(model)
    assert not torch.equal(second, reference)
    model.set_adapter("default")
    assert torch.equal(logits_of(model), first)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), reference)
    assert torch.equal(logits_of(model), first)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits_of(model), second)


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_changes_no_logit_and_the_merged_model_saves_and_loads(method, dtype, tmp_path):
    model = tuned(quantized(method, dtype), ALL[method])
    train_steps(model)
    expected = logits_of(model)
    merged = model.merge_and_unload()
    assert torch.equal(logits_of(merged), expected)
    assert not any(hasattr(module, "base_layer") for module in merged.modules())
    layers = pql.quantized_modules(merged)
    for name, layer in layers.items():
        layout = layer.spec.tensor_layout(*layer.weight.shape)
        assert {entry.dtype for entry in layout.values() if entry.dtype.is_floating_point} == {torch.float32}
        layer.quantized_weight.check(name)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert_same_state(loaded, state_of(merged))
    assert torch.equal(logits_of(loaded), expected)


def test_merging_biases_or_norms_leaves_the_stored_scales_as_they_are():
    model = tuned(quantized(), ("biases", "norms"))
    train_steps(model)
    expected = logits_of(model)
    merged = model.merge_and_unload()
    assert torch.equal(logits_of(merged), expected)
    assert {layer.spec.scale_dtype for layer in pql.quantized_modules(merged).values()} == {"float16"}


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_and_unloading_give_back_the_base_bits(method, dtype):
    base = quantized(method, dtype)
    state = state_of(base)
    specs = {name: layer.spec for name, layer in pql.quantized_modules(base).items()}
    model = tuned(base, ALL[method])
    train_steps(model)
    expected = logits_of(model)
    model.merge_adapter()
    assert torch.equal(logits_of(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits_of(model), expected)
    unloaded = model.unload()
    assert_same_state(unloaded, state)
    assert {name: layer.spec for name, layer in pql.quantized_modules(unloaded).items()} == specs


def test_a_merged_adapter_is_taken_out_to_disable_it():
    base = quantized()
    reference = logits_of(base)
    model = tuned(base, ALL["hqq"])
    train_steps(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits_of(model), reference)


def test_merge_back_takes_tuned_scales_too():
    model = tuned(quantized())
    train_steps(model)
    expected = logits_of(model)
    merged, _ = pql.merge_back(model)
    assert torch.equal(logits_of(merged), expected)


@pytest.mark.parametrize("bf16", [False, True])
@every_method
def test_the_trainer_trains_saves_and_reloads(method, bf16, tmp_path):
    model = tuned(quantized(method), ALL[method])
    before = loss_of(model).item()
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids()] * 4
    arguments = training_arguments(tmp_path, steps=8, bf16=bf16)
    Trainer(model, arguments, train_dataset=rows).train()
    assert loss_of(model).item() < before - 0.1
    loaded = PeftModel.from_pretrained(quantized(method), tmp_path / "checkpoint-8")
    adapter = {name: p for name, p in model.named_parameters() if "quant_scales_tensors" in name}
    assert all(torch.equal(loaded.get_parameter(name), parameter) for name, parameter in adapter.items())


def test_add_adapter_of_transformers_trains_and_loads(tmp_path):
    model = quantized()
    model.add_adapter(QuantScalesConfig())
    first, last = train_steps(model)
    assert last < first
    model.save_pretrained(tmp_path)
    loaded = quantized()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prepare", [pql.prepare_model_for_kbit_training, peft.prepare_model_for_kbit_training])
@every_method
def test_both_kbit_preparations_combine_with_it(method, prepare, dtype):
    model = tuned(prepare(quantized(method, dtype)), ALL[method]).train()
    first, last = train_steps(model)
    assert last < first - 0.1


@pytest.mark.parametrize("use_reentrant", [False, True])
@every_method
def test_gradient_checkpointing_gives_the_same_gradients(method, use_reentrant):
    grads = []
    for is_checkpointed in (False, True):
        base = quantized(method)
        if is_checkpointed:
            kwargs = {"use_reentrant": use_reentrant}
            pql.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=kwargs)
        model = tuned(base, ALL[method]).train()
        loss_of(model).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grads[1][name], grad)


@every_method
def test_gradients_are_those_of_the_loss(method):
    # Central differences of the loss along the gradient of each tensor, in float32: a step of 1 % of the tensor.
    model = tuned(quantized(method), ALL[method])
    loss_of(model).backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or "layers.0" not in name:
            continue
        direction = parameter.grad / parameter.grad.norm() * (float(parameter.detach().norm()) or 0.1) * 0.01
        with torch.no_grad():
            parameter += direction
            above = loss_of(model)
            parameter -= 2 * direction
            below = loss_of(model)
            parameter += direction
        slope = (parameter.grad * direction).sum()
        torch.testing.assert_close((above - below) / 2, slope, rtol=0.05, atol=1e-5, msg=name)


def test_autocast_trains_it():
    model = tuned(quantized(), ALL["hqq"])
    expected = loss_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_it_compiles_without_a_graph_break():
    model = tuned(quantized(), ALL["hqq"])
    expected = loss_of(model)
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=token_ids(), labels=token_ids()).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["q_proj"]}, {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
        ({"target_modules": r".*\.1\..*_proj"}, None),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, None),
        ({"target_modules": ["down_proj"], "layers_to_transform": 1}, {"1.mlp.down_proj"}),
        ({"target_modules": "all-linear", "exclude_modules": r".*layers\.0.*"}, None),
    ],
)
def test_targets_are_named_as_in_peft(fields, expected):
    everywhere = {name.removeprefix("model.layers.") for name in pql.quantized_modules(quantized())}
    expected = expected or {name for name in everywhere if name.startswith("1.")}
    model = tuned(quantized(), **fields)
    assert {name.removeprefix("model.layers.") for name in model.base_model.targeted_module_names} == expected


def test_norms_follow_exclusions_and_layers():
    model = tuned(quantized(), ("norms",), exclude_modules=["post_attention_layernorm"], layers_to_transform=[1])
    assert model.base_model.targeted_module_names == ["model.layers.1.input_layernorm"]


def test_modules_to_save_are_trained_and_saved(tmp_path):
    model = tuned(quantized(), ("scales", "norms"), modules_to_save=["lm_head", "model.norm"])
    train_steps(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {"base_model.model.lm_head.weight", "base_model.model.model.norm.weight"} < saved.keys()
    loaded = PeftModel.from_pretrained(quantized(), tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_the_users_config_stays_as_it_was_and_serves_several_models():
    config = QuantScalesConfig(train=("scales",))
    before = copy.deepcopy(config)
    for method in CONFIGS:
        get_peft_model(quantized(method), config)
    before.base_model_name_or_path = config.base_model_name_or_path  # PEFT's to write, and until 0.21 it did
    assert config == before


def test_the_config_survives_json(tmp_path):
    config = QuantScalesConfig(target_modules=["q_proj"], train=["biases", "scales", "biases"])
    config.save_pretrained(tmp_path)
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is QuantScalesConfig
    assert loaded == config
    assert loaded.train == ("biases", "scales")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"train": ("gains",)}, ValueError, r"\['gains'\] cannot be trained.*codebooks"),
        ({"train": ()}, ValueError, "nothing to train"),
        ({"train": "scales"}, TypeError, r"train=\('scales',\)"),
        ({"train": (3,)}, TypeError, "tuple of names"),
        ({"target_modules": ".*", "layers_to_transform": [1]}, ValueError, "layers_to_transform cannot be combined"),
    ],
)
def test_a_config_that_means_nothing_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        QuantScalesConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": ("codebooks",)}, r"no \['codebooks'\] to train.*only \['biases', 'scales', 'zeros'\]"),
        ({"train": ("scales", "biases"), "target_modules": ["up_proj"]}, r"no \['biases'\]"),
        ({"target_modules": ["nowhere"]}, r"nowhere.*match no quantized layer.*model\.layers\.0"),
        ({"target_modules": ["lm_head"]}, r"lm_head is not a quantized layer.*exclude_modules"),
        ({"target_modules": None}, "match no quantized layer"),
        ({"train": ("norms",), "exclude_modules": ".*"}, "no norm layer"),
    ],
)
def test_a_config_that_does_not_fit_the_model_is_refused_and_the_model_left_alone(fields, message):
    base = quantized()
    for parameter in base.model.norm.parameters():
        parameter.requires_grad = True
    wanted = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    modules, state = [type(module) for module in base.modules()], state_of(base)
    with pytest.raises(ValueError, match=message):
        tuned(base, **fields)
    assert [type(module) for module in base.modules()] == modules
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == wanted
    assert_same_state(base, state)
    assert not hasattr(base, "peft_config")


def test_whole_zeros_are_not_trained():
    base = pql.quantize_model(tiny_model(), HQQConfig(group_size=32, integer_zero=True), progress=False)
    with pytest.raises(ValueError, match=r"no \['zeros'\] to train"):
        tuned(base, ("scales", "zeros"))


def test_a_model_without_quantized_layers_is_refused():
    with pytest.raises(ValueError, match=r"no quantized layer.*quantize_model"):
        tuned(tiny_model())


@pytest.mark.parametrize(
    "other",
    [
        HQQConfig(nbits=4, group_size=32),
        HQQConfig(nbits=3, group_size=16),
        *(config for name, config in CONFIGS.items() if name != "hqq"),
    ],
    ids=str,
)
def test_an_adapter_of_another_quantization_is_refused_and_changes_nothing(other, tmp_path):
    # 3 bits have scales of the same shape as 4 bits: only the codes tell that these are other scales.
    model = tuned(quantized())
    model.save_pretrained(tmp_path)
    base = pql.quantize_model(tiny_model(), other, progress=False)
    state = state_of(base)
    with pytest.raises(ValueError, match=r"model\.layers\.\d.*other codes.*base that it was trained on"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_same_state(base, state)

    second = tuned(base)
    state = state_of(second)
    with pytest.raises(ValueError, match="other codes"):
        second.load_adapter(tmp_path, "second")
    assert_same_state(second, state)
    assert list(second.peft_config) == ["default"]


@pytest.mark.parametrize(("method", "part"), [(m, part) for m in METHODS for part in _metadata(m)])
def test_a_base_with_the_same_codes_and_other_metadata_is_refused(method, part, tmp_path):
    tuned(quantized(method)).save_pretrained(tmp_path)
    PeftModel.from_pretrained(quantized(method), tmp_path)
    base = quantized(method)
    base.model.layers[1].mlp.up_proj.get_parameter(part).data.mul_(1.01)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*base that it was trained on"):
        PeftModel.from_pretrained(base, tmp_path)


def test_a_damaged_file_is_refused_with_the_tensor_named(tmp_path):
    model = tuned(quantized(), target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:, :1].clone()}, file)
    with pytest.raises(RuntimeError, match=r"q_proj\.quant_scales_tensors\.default\.scale"):
        PeftModel.from_pretrained(quantized(), tmp_path)


def test_a_broken_adapter_is_not_merged_into_any_layer():
    base = quantized()
    state = state_of(base)
    model = tuned(base)
    with torch.no_grad():
        [p for p in model.parameters() if p.requires_grad][-1][0, 0] = float("nan")
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: pql.merge_back(model)):
        with pytest.raises(ValueError, match=r"down_proj.* NaN or Inf"):
            merge()
    assert_same_state(model.unload(), state)


def test_what_cannot_be_combined_is_refused():
    model = tuned(quantized())
    model.add_adapter("other", QuantScalesConfig())
    with pytest.raises(ValueError, match="cannot be active together"):
        model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="cannot merge"):
        model.merge_adapter(["default", "other"])
    with pytest.raises(NotImplementedError, match="mixed batches"):
        model(token_ids(), adapter_names=["default", "other"])
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="cannot merge"):
        model.merge_adapter(["other"])
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.add_adapter("third", QuantScalesConfig())
    model.unmerge_adapter()

    with pytest.raises(ValueError, match="LoRA on top of tuned scales"):
        get_peft_model(model.base_model.model, peft.LoraConfig(target_modules=["q_proj"]))
    lora = get_peft_model(quantized(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj carries an adapter of another kind \(LoraQuantizedLinear\)"):
        tuned(lora.base_model.model)
    norms = get_peft_model(quantized(), peft.LNTuningConfig(target_modules=["input_layernorm"]))
    with pytest.raises(ValueError, match=r"input_layernorm carries an adapter of another kind \(LNTuningLayer\)"):
        tuned(norms.base_model.model, ("norms",))


def test_unregistering_takes_it_out_of_peft_and_registering_puts_it_back():
    pql.unregister()
    try:
        assert "QUANT_SCALES" not in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
        assert "QUANT_SCALES" not in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
        assert "QUANT_SCALES" not in peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING
    finally:
        pql.register()
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["QUANT_SCALES"] is pql.QuantScalesModel
