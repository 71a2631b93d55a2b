"""What makes the outputs stays dense: heads of every task, of models inside other models and inside plain modules."""

import pytest
import torch
from _tiny_models import tiny_model
from torch import nn

from peft_quantlayers import HQQConfig, quantize_model, quantized_modules
from peft_quantlayers.layers.dense_types import dense_type_of

CONFIG = HQQConfig(group_size=16, iters=1)
# The head's modules by the names of their last parts, and a class that has them.
HEADS = {
    "LlamaForSequenceClassification": {"score"},
    "LlamaForTokenClassification": {"score"},
    "LlamaForQuestionAnswering": {"qa_outputs"},
    "BertForMaskedLM": {"cls.predictions.transform.dense", "cls.predictions.decoder"},
    "BertForNextSentencePrediction": {"cls.seq_relationship"},
    "RobertaForSequenceClassification": {"classifier.dense", "classifier.out_proj"},
    "ViTForImageClassification": {"classifier"},
    "WhisperForAudioClassification": {"projector", "classifier"},
    "Wav2Vec2ForCTC": {"lm_head"},
    "T5ForConditionalGeneration": {"lm_head"},
    "T5ForSequenceClassification": {"classification_head.dense", "classification_head.out_proj"},
}


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"language": model})


def dense_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if dense_type_of(module) is not None}


@pytest.mark.parametrize("is_inside", [False, True], ids=["alone", "inside a module"])
@pytest.mark.parametrize("class_name", HEADS)
def test_the_head_of_a_task_stays_dense(class_name, is_inside):
    model, prefix = tiny_model(class_name), ""
    names = dense_names(model)
    if is_inside:
        model, prefix = Wrapper(model), "backbone.language."
    quantize_model(model, CONFIG, progress=False)
    heads = {name for name in names if name in HEADS[class_name]}
    assert heads == HEADS[class_name]
    assert heads <= {name.removeprefix(prefix) for name in dense_names(model)}
    assert len(quantized_modules(model)) > 2


@pytest.mark.parametrize(
    "class_name", ["VisionEncoderDecoderModel", "SpeechEncoderDecoderModel", "EncoderDecoderModel"]
)
def test_the_head_of_a_decoder_inside_stays_dense(class_name):
    model = tiny_model(class_name)
    quantize_model(model, CONFIG, progress=False)
    heads = {name for name, _ in model.decoder.named_modules() if name.startswith(("cls.", "lm_head"))}
    assert {name for name in heads if name in dense_names(model.decoder)}
    assert not any(name.startswith(("decoder.cls", "decoder.lm_head")) for name in quantized_modules(model))
    assert any(name.startswith("decoder.") for name in quantized_modules(model))


def test_one_layer_around_a_model_is_no_part_of_it():
    """A plain module's own linear layers are quantized as before, heads of the model inside are not."""
    wrapper = Wrapper(tiny_model("LlamaForCausalLM"))
    wrapper.projector = nn.Linear(64, 64)
    quantize_model(wrapper, CONFIG, progress=False)
    assert "projector" in quantized_modules(wrapper)
    assert dense_names(wrapper) == {"backbone.language.lm_head"}
    assert wrapper.projector(torch.ones(1, 64)).shape == (1, 64)
