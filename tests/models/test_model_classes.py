"""A sample of model classes, tiny: quantized in memory = while loading = saved and loaded, a LoRA step, a merge.

``make models`` runs all generative classes and writes ``docs/models.md``. A class is here for what it has and others
have not; ``DIFFERENT`` names what is not right yet, and fails once it is.
"""

import re
from typing import Any

import pytest
from _model_journey import STEPS, journey
from _tiny_models import generative_classes, tiny_config, tiny_model
from every_method import all_methods, quick_config
from transformers import LlamaConfig

from peft_quantlayers import AQLMConfig

SAMPLE = (
    # decoders: plain, tied, Conv1D, FalconLinear, biases, parallel blocks, float32 parts
    "LlamaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel", "FalconForCausalLM", "BloomForCausalLM",
    "GPTNeoXForCausalLM", "Phi3ForCausalLM", "OPTForCausalLM", "Qwen3ForCausalLM", "Olmo2ForCausalLM",
    # experts: fused, with shared ones, tied, routers of many kinds
    "MixtralForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM", "PhimoeForCausalLM",
    "Llama4ForCausalLM", "HunYuanMoEV1ForCausalLM", "LongcatFlashForCausalLM", "DiffusionGemmaForBlockDiffusion",
    # no attention, or not only
    "MambaForCausalLM", "Mamba2ForCausalLM", "FalconH1ForCausalLM", "JambaForCausalLM", "RecurrentGemmaForCausalLM",
    "Qwen3NextForCausalLM", "NemotronHForCausalLM", "RwkvForCausalLM",
    # encoder-decoders, speech
    "T5ForConditionalGeneration", "BartForConditionalGeneration", "SwitchTransformersForConditionalGeneration",
    "WhisperForConditionalGeneration", "MoonshineForConditionalGeneration", "EncoderDecoderModel",
    # several modalities, whose files name their modules otherwise
    "LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "Gemma3ForConditionalGeneration",
    "MllamaForConditionalGeneration", "Mistral3ForConditionalGeneration", "Idefics3ForConditionalGeneration",
    "Blip2ForConditionalGeneration", "Qwen2AudioForConditionalGeneration", "VisionEncoderDecoderModel",
    "MusicgenForConditionalGeneration",
    # several weights in one tensor of the file
    "Step3p7ForConditionalGeneration", "HrmTextForCausalLM",
)  # fmt: skip

# Class and step: a pattern for the difference or the error.
DIFFERENT: dict[tuple[str, str], str] = {}


def wrong_steps(row: dict[str, Any]) -> dict[str, str]:
    assert "build" not in row, row["build"]
    assert row["layers"] > 0
    return {step: row[step] for step in STEPS if row[step] and not row[step].startswith("as on the float model: ")}


@pytest.mark.parametrize("class_name", SAMPLE)
def test_every_way_gives_the_same_model(class_name, tmp_path):
    wrong = wrong_steps(journey(class_name, tmp_path))
    expected = {step: pattern for (name, step), pattern in DIFFERENT.items() if name == class_name}
    assert wrong.keys() == expected.keys(), wrong
    assert all(re.search(expected[step], text) for step, text in wrong.items())


@pytest.mark.parametrize(
    "class_name", ["Qwen3MoeForCausalLM", "T5ForConditionalGeneration", "LlavaForConditionalGeneration"]
)
@all_methods
def test_so_it_is_with_every_method(method, class_name, tmp_path):
    # The published layout of AQLM says nothing of how codes were found: a loaded model has the default.
    rounds = {"rounds": AQLMConfig().rounds} if method == "aqlm" else {}
    assert not wrong_steps(journey(class_name, tmp_path, quick_config(method, **rounds)))


def test_the_tiny_models_are_tiny_and_there_are_many():
    classes = generative_classes()
    assert len(classes) > 300
    assert set(SAMPLE) <= set(classes)
    config = tiny_config(LlamaConfig)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (64, 2, 256)


def test_one_layer_of_each_kind_is_kept():
    kinds = [type(layer.mlp).__name__ for layer in tiny_model("DeepseekV3ForCausalLM").model.layers]
    assert sorted(set(kinds)) == ["DeepseekV3MLP", "DeepseekV3MoE"]
