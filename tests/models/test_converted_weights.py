"""Models whose files hold several weights as one tensor: each is quantized while loading as in memory."""

import pytest
from _model_journey import differences
from _tiny_models import tiny_model

from peft_quantlayers import HQQConfig, quantize_model, quantized_modules


@pytest.mark.parametrize("class_name", ["Step3p7ForConditionalGeneration", "HrmTextForCausalLM"])
@pytest.mark.parametrize("skipped", [None, ["q_proj"], ["k_proj", "v_proj"], ["up_proj"]], ids=str)
def test_each_of_them_is_quantized_or_left_dense_by_its_own_name(class_name, skipped, tmp_path):
    model = tiny_model(class_name)
    model.save_pretrained(tmp_path)
    config = HQQConfig(group_size=32, iters=1, skip_modules=skipped)
    in_memory = quantize_model(type(model).from_pretrained(tmp_path), config, progress=False)
    while_loading = type(model).from_pretrained(tmp_path, quantization_config=config)
    assert quantized_modules(in_memory)
    assert differences(in_memory, while_loading, None) == ""
