"""Quantizing while loading, saving, and loading again, through plain transformers calls."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from programs import run_program
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.models.falcon.modeling_falcon import FalconLinear

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig, HQQLinear
from peft_quantlayers.integrations import transformers_registry
from peft_quantlayers.integrations.replacements import Replacements

from .tiny import FAMILIES, saved_tiny_model, tiny_model, token_ids

CONFIG = HQQConfig(nbits=4, group_size=32)


def auto_class(family: str) -> type:
    return AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.fixture
def float_folder(tmp_path):
    return saved_tiny_model(tmp_path / "float")


@pytest.fixture
def saved(float_folder, tmp_path):
    """Folder of a saved quantized model, and its logits."""
    model = AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=CONFIG)
    model.save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized", logits(model)


# ---- quantizing while loading


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_quantizes_saves_and_loads_again_bit_for_bit(family, tmp_path):
    folder = saved_tiny_model(tmp_path / "float", family)
    dense = tiny_model(family)
    model = auto_class(family).from_pretrained(folder, quantization_config=CONFIG)
    layers = pql.quantized_modules(model)
    linears = [
        name
        for name, module in dense.base_model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D", "FalconLinear") and name
    ]
    assert len(layers) == len(linears)
    assert all(type(layer) is HQQLinear for layer in layers.values())
    assert model.num_parameters() == dense.num_parameters()
    assert model.get_memory_footprint() < dense.get_memory_footprint()
    for name, layer in layers.items():
        linear = dense.get_submodule(name)
        weight = linear.weight.t() if type(linear).__name__ == "Conv1D" else linear.weight
        assert (layer.dequantize() - weight).norm() < 0.12 * weight.norm()
    torch.testing.assert_close(logits(model), logits(pql.dequantize_model(copy.deepcopy(model))))

    model.save_pretrained(tmp_path / "quantized")
    loaded = auto_class(family).from_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(loaded), logits(model))
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_quantizing_while_loading_equals_quantizing_in_memory(family, tmp_path):
    folder = saved_tiny_model(tmp_path / "float", family)
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIG).state_dict()
    in_memory = pql.quantize_model(tiny_model(family), CONFIG, progress=False).state_dict()
    assert loaded.keys() == in_memory.keys()
    for name in loaded:
        assert torch.equal(loaded[name], in_memory[name]), name


def test_falcon_trains_an_adapter_merges_back_and_gets_its_own_layers_back():
    model = pql.quantize_model(tiny_model("falcon"), CONFIG, progress=False)
    torch.manual_seed(0)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = peft_model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    merged, report = pql.merge_back(peft_model)
    assert len(report.layers) == len(pql.quantized_modules(merged)) == 8
    quantized = logits(merged)
    dense = pql.dequantize_model(merged)
    assert type(dense.transformer.h[0].mlp.dense_h_to_4h) is FalconLinear
    torch.testing.assert_close(logits(dense), quantized)


def test_a_model_quantized_in_memory_saves_and_loads(tmp_path):
    model = pql.quantize_model(tiny_model(), CONFIG, progress=False)
    assert model.is_quantized
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_the_output_head_stays_dense_unless_asked_for(float_folder):
    model = AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=CONFIG)
    assert type(model.lm_head) is nn.Linear
    config = HQQConfig(nbits=4, group_size=32, quantize_lm_head=True)
    assert type(AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=config).lm_head) is HQQLinear


@pytest.mark.parametrize("quantize_lm_head", [False, True])
def test_tied_embeddings_stay_tied(quantize_lm_head, tmp_path):
    folder = saved_tiny_model(tmp_path / "float", "llama-tied")
    config = HQQConfig(nbits=4, group_size=32, quantize_lm_head=quantize_lm_head)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(model))


def test_overrides_and_skip_modules_give_mixed_bits_that_survive_saving(float_folder, tmp_path):
    config = HQQConfig(
        nbits=3,
        group_size=32,
        overrides={"down_proj": {"nbits": 8}, "layers.1.mlp.*": {"group_size": 16}},
        skip_modules=["layers.0.self_attn"],
    )
    model = AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=config)
    model.save_pretrained(tmp_path / "quantized")
    for candidate in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")):
        layers = candidate.model.layers
        assert type(layers[0].self_attn.q_proj) is nn.Linear
        assert (layers[0].mlp.down_proj.spec.nbits, layers[0].mlp.down_proj.spec.group_size) == (8, 32)
        assert (layers[1].mlp.down_proj.spec.nbits, layers[1].mlp.down_proj.spec.group_size) == (8, 16)
        assert (layers[1].self_attn.q_proj.spec.nbits, layers[1].self_attn.q_proj.spec.group_size) == (3, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_models_dtype_reaches_the_layers_and_survives_saving(dtype, float_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(float_folder, dtype=dtype, quantization_config=CONFIG)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.compute_dtype == dtype
    assert layer.scale.dtype == torch.float16
    assert logits(model).dtype == dtype
    model.save_pretrained(tmp_path / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(loaded), logits(model))


def test_a_compute_dtype_of_its_own_survives_saving(float_folder, tmp_path):
    config = HQQConfig(nbits=4, group_size=32, compute_dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(float_folder, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(tmp_path / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    for candidate in (model, loaded):
        assert candidate.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
        assert candidate.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps_load_the_same_model(device_map, float_folder, saved):
    folder, expected = saved
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)), expected)
    on_the_fly = AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=CONFIG, device_map=device_map)
    assert torch.equal(logits(on_the_fly), expected)


def test_a_device_map_to_disk_is_refused(float_folder):
    with pytest.raises(ValueError, match="disk"):
        AutoModelForCausalLM.from_pretrained(
            float_folder, quantization_config=CONFIG, device_map={"model": "cpu", "lm_head": "disk"}
        )


def test_a_copy_whose_layers_change_later_is_saved_as_it_is_then(saved, tmp_path):
    model = copy.deepcopy(AutoModelForCausalLM.from_pretrained(saved[0]))
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = layer.weight * 1e-6  # too small for float16 scales: the layer's spec changes
    assert layer.spec.scale_dtype == "float32"
    model.save_pretrained(tmp_path / "changed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "changed")), logits(model))


def test_sharded_checkpoints_round_trip(float_folder, saved, tmp_path):
    folder, expected = saved
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")), expected)


def test_a_new_process_computes_identical_logits(saved, tmp_path):
    folder, expected = saved
    script = (
        "import torch, peft_quantlayers\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))\n"
        f"torch.save(model(ids).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    done = run_program("-c", script)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_the_base_model_of_a_saved_model_loads_without_its_head(saved):
    folder, _ = saved
    with_head = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModel.from_pretrained(folder)
    assert len(pql.quantized_modules(base)) == len(pql.quantized_modules(with_head))
    ids = token_ids()
    assert torch.equal(base(ids).last_hidden_state, with_head.model(ids).last_hidden_state)


def test_dequantize_gives_the_plain_model_which_saves_as_such(saved, tmp_path):
    folder, expected = saved
    model = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(logits(model), expected)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    pql.unregister()
    try:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    finally:
        pql.register()
    assert torch.equal(logits(plain), logits(model))


def test_generate_works(saved):
    folder, _ = saved
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generate(token_ids(), max_new_tokens=4, do_sample=False).shape == (2, 13)


def test_trainer_refuses_the_bare_model_and_says_adapters(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved[0])
    with pytest.raises(ValueError, match="adapters"):
        Trainer(model, TrainingArguments(tmp_path, report_to="none"))


# ---- bad input


def refused_load(folder, match: str, error: type[Exception] = ValueError, **kwargs) -> None:
    with pytest.raises(error, match=match):
        AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def edited_tensors(folder, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edited_config(folder, edit) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop(f"{LAYER}.scale"), rf"lacks.*{LAYER}\.scale"),
        (lambda t: t.update({f"{LAYER}.shift": torch.zeros(3)}), rf"unexpected tensor '{LAYER}\.shift'"),
        (lambda t: t.update({f"{LAYER}.W_q": t[f"{LAYER}.W_q"][:5].clone()}), rf"{LAYER}\.W_q.*shape"),
        (lambda t: t.update({f"{LAYER}.W_q": t[f"{LAYER}.W_q"].int()}), rf"{LAYER}\.W_q.*uint8"),
        (lambda t: t.update({f"{LAYER}.scale": t[f"{LAYER}.scale"].float()}), rf"{LAYER}\.scale.*float16"),
        (lambda t: t[f"{LAYER}.zero"].fill_(float("nan")), rf"{LAYER}\.zero holds NaN"),
        (lambda t: t[f"{LAYER}.scale"].zero_(), rf"{LAYER}\.scale holds nothing but zeros"),
    ],
    ids=["missing", "extra", "wrong-shape", "wrong-dtype-codes", "wrong-dtype-scale", "nan", "zero-scales"],
)
def test_a_damaged_checkpoint_is_refused_with_the_tensors_name(edit, match, saved):
    folder, _ = saved
    edited_tensors(folder, edit)
    refused_load(folder, match)


def test_a_truncated_file_is_refused(saved):
    folder, _ = saved
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused_load(folder, "damaged or incomplete")


def test_a_pickle_checkpoint_is_refused(saved):
    folder, _ = saved
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused_load(folder, "safetensors")


@pytest.mark.parametrize(
    ("edit", "error", "match"),
    [
        (lambda c: c.update(format_version=99), ValueError, "newer.*[Uu]pgrade"),
        (lambda c: c.update(format_version="1"), ValueError, "format_version"),
        (lambda c: c.update(format_version=True), ValueError, "format_version"),
        (lambda c: c.update(surprise=1), ValueError, "surprise"),
        (lambda c: c.update(specs={}), TypeError, "specs"),
        (lambda c: c.update(modules=[]), TypeError, "modules"),
        (lambda c: c["specs"][0].update(nbits=-4), ValueError, r"specs\[0\].*nbits"),
        (lambda c: c["specs"][0].update(nbits=7), ValueError, r"specs\[0\].*nbits"),
        (lambda c: c["specs"][0].update(nbits="4"), ValueError, r"specs\[0\].*nbits"),
        (lambda c: c["specs"][0].update(group_size=2**60), ValueError, "group_size"),
        (lambda c: c["specs"][0].update(group_size=-64), ValueError, "group_size"),
        (lambda c: c["specs"][0].update(group_size=7), ValueError, "not a multiple of group_size=7"),
        (lambda c: c["specs"][0].update(group_size=[64]), TypeError, "group_size"),
        (lambda c: c["specs"][0].update(axis=True), ValueError, "axis"),
        (lambda c: c["specs"][0].update(scale_dtype="os.system"), ValueError, "scale_dtype"),
        (lambda c: c["specs"][0].update(beta=float("nan")), ValueError, "beta"),
        (lambda c: c["specs"][0].update(method="nonsense"), ValueError, "nonsense"),
        (lambda c: c["specs"].__setitem__(0, 5), TypeError, r"specs\[0\]"),
        (lambda c: c["modules"].pop(LAYER), ValueError, f"{LAYER}.*random numbers"),
        (lambda c: c["modules"].update({LAYER: 10**9}), ValueError, LAYER),
        (lambda c: c["modules"].update({LAYER: -1}), ValueError, LAYER),
        (lambda c: c["modules"].update({"model.layers.9.mlp.up_proj": 0}), ValueError, "layers.9"),
        (lambda c: c["modules"].update({"model.norm": 0}), ValueError, "model.norm"),
        (lambda c: c.update(compute_dtype="float8"), ValueError, "compute_dtype"),
    ],
)
def test_a_hostile_config_is_refused(edit, error, match, saved):
    folder, _ = saved
    edited_config(folder, edit)
    refused_load(folder, match, error)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (HQQConfig(group_size=48, on_misfit="refuse"), "not a multiple of group_size=48"),
        (HQQConfig(group_size=32, overrides={"nonsense": {"nbits": 8}}), "'nonsense' matches no module"),
        (HQQConfig(group_size=32, skip_modules=["nonsense"]), "'nonsense' matches no module"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_on_both_routes(config, match, float_folder):
    refused_load(float_folder, match, quantization_config=config)
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        pql.quantize_model(model, config, progress=False)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not hasattr(model, "hf_quantizer") or model.hf_quantizer is None


def test_a_nan_weight_is_refused_by_name_on_both_routes(tmp_path):
    model = tiny_model()
    model.get_submodule(LAYER).weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    refused_load(tmp_path, rf"{LAYER}.*NaN", quantization_config=CONFIG)
    with pytest.raises(ValueError, match=rf"{LAYER}.*NaN"):
        pql.quantize_model(model, CONFIG, progress=False)
    assert not pql.quantized_modules(model)


def test_quantizing_twice_is_refused(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[0])
    for config in (CONFIG, HQQConfig(nbits=3, group_size=32)):
        with pytest.raises(ValueError, match="quantized already"):
            pql.quantize_model(model, config, progress=False)


def test_save_model_refuses_a_folder_with_files_and_writes_nothing(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved[0])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        pql.save_model(model, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    pql.save_model(model, tmp_path / "mine", overwrite=True)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "mine")), saved[1])
    assert "import peft_quantlayers" in (tmp_path / "mine" / "README.md").read_text()


def test_a_save_that_fails_leaves_no_half_written_checkpoint(saved, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(saved[0])

    def fail(self: PreTrainedModel, folder, **_: object) -> None:
        (folder / "model.safetensors").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    target = tmp_path / "target"
    with pytest.raises(OSError, match="disk full"):
        pql.save_model(model, target)
    assert not target.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".target")]


def test_a_float_weight_of_another_shape_than_the_config_says_is_refused_while_quantizing(tmp_path):
    folder = saved_tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(ValueError, match=r"up_proj\.weight has the shape \(96, 64\) in the files"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=HQQConfig(nbits=4, group_size=16))


def test_a_transformers_that_wants_a_peft_that_is_not_there_is_told_with_what_works(monkeypatch, caplog):
    transformers_registry.warn_of_unreleased_peft()
    assert "transformers" not in caplog.text
    monkeypatch.setattr(transformers_registry.adapters, "MIN_PEFT_VERSION", "99.0")
    transformers_registry.warn_of_unreleased_peft()
    assert "wants PEFT 99.0 in model.add_adapter" in caplog.text
    assert "peft.get_peft_model and PeftModel.from_pretrained work" in caplog.text


@pytest.mark.parametrize(
    ("release", "wanted", "accepted"),
    [("5.24.0", "0.22.0", "0.20.0"), ("5.24.1", "0.20.0", "0.20.0"), ("5.25.0", "0.22.0", "0.22.0")],
)
def test_the_transformers_whose_wanted_peft_is_not_released_takes_the_one_that_is(
    release, wanted, accepted, monkeypatch
):
    monkeypatch.setattr(transformers_registry.transformers, "__version__", release)
    monkeypatch.setattr(transformers_registry.adapters, "MIN_PEFT_VERSION", wanted)
    monkeypatch.setattr(transformers_registry, "_replaced", Replacements())
    transformers_registry.accept_released_peft()
    assert accepted == transformers_registry.adapters.MIN_PEFT_VERSION
    transformers_registry._replaced.restore()
    assert wanted == transformers_registry.adapters.MIN_PEFT_VERSION
