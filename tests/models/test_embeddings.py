"""Quantized embeddings in a sample of all generative classes: in memory, tied again, saved and loaded."""

import pytest
import torch
from _tiny_models import first_float, generative_classes, tiny_inputs, tiny_model

from peft_quantlayers import HQQConfig, quantize_model, save_model
from peft_quantlayers.layers.quantized_layers import quantized_embeddings

# Every twentieth, and what is special about others: five copies, tables of codebooks, rows that a class normalises.
NORMED = "InklingForCausalLM"
SPECIAL = (
    "ProphetNetForConditionalGeneration",
    "CsmForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    NORMED,
)
CLASSES = (*list(generative_classes())[::20], *SPECIAL)


@pytest.mark.parametrize("name", dict.fromkeys(CLASSES))
def test_tables_of_any_class_are_quantized_saved_and_loaded(name, tmp_path):
    try:
        model = tiny_model(name)
        inputs = tiny_inputs(model)
    except Exception as error:  # whatever a class cannot do without its own packages or files
        pytest.skip(f"no tiny model of this class: {error!r}")
    if inputs is None:
        pytest.skip("no inputs of this class are known")

    def outputs(each):
        torch.manual_seed(0)  # one class draws what it is to denoise
        with torch.no_grad():
            return first_float(each(**inputs))

    before, n_parameters = outputs(model), model.num_parameters()
    quantize_model(model, HQQConfig(nbits=8, quantize_embeddings=8), progress=False)
    assert bool(quantized_embeddings(model)) == (name != NORMED)
    after = outputs(model)
    assert (after - before).norm() < 0.15 * before.norm()
    assert model.num_parameters() == n_parameters
    model.tie_weights()
    assert torch.equal(outputs(model), after)
    save_model(model, tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert torch.equal(outputs(loaded), after)
    assert loaded.num_parameters() == n_parameters
