"""Models whose files name their modules otherwise than the model does, heads and routers included: every method is the
same model in memory, while loading, and saved and loaded; under the file's names as under the modules'."""

import json

import pytest
import torch
from _model_journey import differences
from _tiny_models import tiny_model
from every_method import METHODS, quick_config
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

import peft_quantlayers as pql
from peft_quantlayers import AQLMConfig, HQQConfig, quantized_modules

pytestmark = pytest.mark.usefixtures("toy_method")
CONFIGS = {name: quick_config(name) for name in METHODS} | {
    "hqq": HQQConfig(nbits=4, group_size=32, iters=1),
    # Not in rounds, of which files in the published format do not say how many there were.
    "aqlm": AQLMConfig(num_codebooks=1, nbits_per_codebook=3),
}
MODELS = [
    "LlavaForConditionalGeneration", "PaliGemmaForConditionalGeneration", "Gemma3ForConditionalGeneration",
    "Qwen2VLForConditionalGeneration", "MllamaForConditionalGeneration", "VisionEncoderDecoderModel",
    "DetrForObjectDetection", "RTDetrForObjectDetection", "NomicBertModel",
]  # fmt: skip
# Those that every method runs on; to the others a method makes no difference.
EVERY_METHOD = ("LlavaForConditionalGeneration", "VisionEncoderDecoderModel", "NomicBertModel")
OTHER_TASKS = [
    "BertForSequenceClassification", "ViTForImageClassification", "CLIPForImageClassification",
    "Wav2Vec2ForSequenceClassification", "ASTForAudioClassification", "WhisperForAudioClassification",
]  # fmt: skip


def saved_float(class_name, folder):
    model = small_detr() if class_name == "DetrForObjectDetection" else tiny_model(class_name)
    model.save_pretrained(folder)
    return type(model)


def small_detr():
    """Without a backbone of another package."""
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    sizes = {"d_model": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 1, "decoder_layers": 1}
    return DetrForObjectDetection(DetrConfig(backbone_config=backbone, num_queries=5, **sizes))


def reload_is_equal(model, folder):
    loaded = type(model).from_pretrained(folder)
    assert differences(model, loaded, None) == ""


@pytest.mark.parametrize(
    ("class_name", "method"),
    [(name, method) for name in MODELS for method in CONFIGS if method == "hqq" or name in EVERY_METHOD],
)
def test_a_model_comes_back_as_it_was_saved(class_name, method, tmp_path):
    model_type = saved_float(class_name, tmp_path / "float")
    in_memory = pql.quantize_model(model_type.from_pretrained(tmp_path / "float"), CONFIGS[method], progress=False)
    while_loading = model_type.from_pretrained(tmp_path / "float", quantization_config=CONFIGS[method])
    assert differences(in_memory, while_loading, None) == ""
    for name, model in (("in memory", in_memory), ("while loading", while_loading)):
        pql.save_model(model, tmp_path / name)
        reload_is_equal(model, tmp_path / name)
    in_memory.save_pretrained(tmp_path / "module names", save_original_format=False)
    reload_is_equal(in_memory, tmp_path / "module names")


@pytest.mark.parametrize("class_name", OTHER_TASKS)
def test_heads_of_other_tasks_stay_dense_and_models_come_back(class_name, tmp_path):
    model_type = saved_float(class_name, tmp_path / "float")
    model = model_type.from_pretrained(tmp_path / "float", quantization_config=CONFIGS["hqq"])
    dense = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert any(name.rpartition(".")[2] in ("classifier", "dense") for name in dense)
    assert not any(name.startswith("classifier") for name in quantized_modules(model))
    pql.save_model(model, tmp_path / "quantized")
    reload_is_equal(model, tmp_path / "quantized")


def test_files_in_their_own_names_keep_them(tmp_path):
    model = pql.quantize_model(tiny_model("LlavaForConditionalGeneration"), CONFIGS["hqq"], progress=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    stored = {key.rpartition(".")[0] for key in load_file(tmp_path / "model.safetensors") if key.endswith(".W_q")}
    assert "model.language_model.layers.0.mlp.up_proj" in config["modules"]
    assert "language_model.model.layers.0.mlp.up_proj" in stored  # as transformers names it in files


@pytest.mark.parametrize("class_name", ["NomicBertModel", "RfDetrForObjectDetection", "GteModel"])
@pytest.mark.parametrize("skipped", [None, ["k_proj"]], ids=str)
def test_codes_stay_out_of_conversions_that_join_weights(class_name, skipped, tmp_path):
    config = HQQConfig(nbits=4, group_size=32, iters=1, skip_modules=skipped)
    model_type = saved_float(class_name, tmp_path / "float")
    for name, model in (
        ("loaded", model_type.from_pretrained(tmp_path / "float", quantization_config=config)),
        ("made", pql.quantize_model(tiny_model(class_name), config, progress=False)),
    ):
        pql.save_model(model, tmp_path / name)
        reload_is_equal(model, tmp_path / name)


ROUTERS = {
    "Qwen2MoeForCausalLM": ["mlp.shared_expert_gate"],
    "SwitchTransformersForConditionalGeneration": ["mlp.router.classifier"],
    "Qwen3NextForCausalLM": ["mlp.shared_expert_gate"],
    "LongcatFlashForCausalLM": ["mlp.router.classifier"],
}


@pytest.mark.parametrize("class_name", ROUTERS)
def test_routers_and_gates_of_experts_stay_dense(class_name):
    model = pql.quantize_model(tiny_model(class_name), CONFIGS["hqq"], progress=False)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for suffix in ROUTERS[class_name]:
        found = [name for name in linears if name.endswith(suffix)]
        assert found
        assert not quantized_modules(model).keys() & set(found)


HEADS = {
    "MllamaForConditionalGeneration": "lm_head",
    "Llama4ForConditionalGeneration": "language_model.lm_head",
    "VisionEncoderDecoderModel": "decoder.cls.predictions.decoder",
    "WhisperForConditionalGeneration": "proj_out",
    "MusicgenForConditionalGeneration": "decoder.lm_heads",
}


@pytest.mark.parametrize("class_name", HEADS)
def test_output_embeddings_stay_dense_wherever_they_are(class_name):
    model = pql.quantize_model(tiny_model(class_name), CONFIGS["hqq"], progress=False)
    assert any(HEADS[class_name] in name for name, _ in model.named_modules())
    assert not [name for name in quantized_modules(model) if HEADS[class_name] in name]


@pytest.mark.parametrize("class_name", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_a_head_that_cannot_be_quantized_is_told(class_name, caplog):
    model = tiny_model(class_name)
    if not model.all_tied_weights_keys:
        model.lm_head = None
    pql.quantize_model(model, HQQConfig(group_size=32, iters=1, quantize_lm_head=True), progress=False)
    assert "quantize_lm_head=True has no effect" in caplog.text


def test_the_compute_dtype_of_each_layer_is_saved_where_they_differ(tmp_path):
    model_type = saved_float("T5ForConditionalGeneration", tmp_path / "float")
    model = model_type.from_pretrained(
        tmp_path / "float", dtype=torch.float16, quantization_config=HQQConfig(group_size=32, compute_dtype="float16")
    )
    dtypes = {name: layer.compute_dtype for name, layer in quantized_modules(model).items()}
    assert {dtype for name, dtype in dtypes.items() if name.endswith("wo")} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if not name.endswith("wo")} == {torch.float16}
    pql.save_model(model, tmp_path / "quantized")
    fields = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert fields["format_version"] >= 3
    assert set(fields["compute_dtypes"].values()) == {"float32"}
    reload_is_equal(model, tmp_path / "quantized")


def test_old_folders_without_that_field_load_what_transformers_keeps_in_float32(tmp_path):
    model_type = saved_float("T5ForConditionalGeneration", tmp_path / "float")
    model = model_type.from_pretrained(
        tmp_path / "float", dtype=torch.float16, quantization_config=HQQConfig(group_size=32)
    )
    model.save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["compute_dtypes"]
    config["quantization_config"]["format_version"] = 1
    path.write_text(json.dumps(config))
    reload_is_equal(model, tmp_path / "old")


def test_a_model_that_is_all_half_precision_comes_back_so(tmp_path):
    model = pql.quantize_model(
        tiny_model("T5ForConditionalGeneration").half(), HQQConfig(group_size=32), progress=False
    )
    assert {layer.compute_dtype for layer in quantized_modules(model).values()} == {torch.float16}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {layer.compute_dtype for layer in quantized_modules(loaded).values()} == {torch.float16}


def test_a_saved_model_is_dequantized_in_its_own_dtypes(tmp_path):
    model = pql.quantize_model(tiny_model("LlamaForCausalLM").half(), CONFIGS["hqq"], progress=False)
    model.save_pretrained(tmp_path)  # its config has the dtype as text from now on
    assert model.dequantize().model.layers[0].mlp.up_proj.weight.dtype == torch.float16


def test_published_aqlm_of_a_vision_language_model_loads_under_the_files_names(tmp_path):
    model = pql.quantize_model(tiny_model("LlavaForConditionalGeneration"), CONFIGS["aqlm"], progress=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "aqlm"
    reload_is_equal(model, tmp_path)


def test_one_missing_layer_of_a_published_folder_is_an_error(tmp_path):
    model = pql.quantize_model(tiny_model("LlavaForConditionalGeneration"), CONFIGS["aqlm"], progress=False)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    layer = "language_model.model.layers.0.mlp.up_proj."
    tensors = {key: tensor for key, tensor in load_file(file).items() if not key.startswith(layer)}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.safetensors.*lacks 1 tensor.*layers\.0\.mlp\.up_proj\.weight"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("class_name", ["LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration"])
def test_loftq_finds_the_float_weights_under_the_files_names(class_name, tmp_path):
    model_type = saved_float(class_name, tmp_path / "float")
    stored = load_file(tmp_path / "float" / "model.safetensors")
    errors = []
    for reference in (tmp_path / "float", model_type.from_pretrained(tmp_path / "float")):
        base = pql.quantize_model(model_type.from_pretrained(tmp_path / "float"), CONFIGS["hqq"], progress=False)
        assert not all(f"{name}.weight" in stored for name in quantized_modules(base))
        adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
        errors.append(
            {each.name: each.error_after for each in pql.initialize_loftq(adapted, reference, progress=False)}
        )
    assert errors[0] == errors[1]
    assert errors[0]


def test_a_key_mapping_that_quantized_layers_would_need_is_refused_in_words(tmp_path):
    """transformers does not tell a quantizer of it; without one the folder loads under any name that it knows."""
    model = pql.quantize_model(tiny_model("LlamaForCausalLM"), CONFIGS["hqq"], progress=False)
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved", key_mapping={"^nothing": "else"})
    assert differences(model, loaded, None) == ""
    file = tmp_path / "saved" / "model.safetensors"
    renamed = {key.replace("model.layers", "transformer.blocks"): t for key, t in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    for options in ({}, {"key_mapping": {"^transformer.blocks": "model.layers"}}):
        with pytest.raises(ValueError, match=r"lacks \d+ tensor.*key_mapping.*rename"):
            type(model).from_pretrained(tmp_path / "saved", **options)
