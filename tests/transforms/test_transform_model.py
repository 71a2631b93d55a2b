"""Transformed models are quantized, trained, merged, saved and loaded as any other, and say what was done."""

import copy
import itertools
import warnings

import peft
import pytest
import torch
from every_method import all_methods, methods_for, quick_config
from tiny_models import change, logits, tiny_model
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql

CONFIG = pql.HQQConfig(nbits=4, group_size=8)
DATA = torch.randint(3, 90, (40, 20), generator=torch.Generator().manual_seed(7))
TRANSFORMS = [pql.Rotation(seed=3), pql.AWQScales(n_grid=2)]
LORA = peft.LoraConfig(r=4, target_modules="all-linear")
NAMES = ["rotation", "awq_scales"]


def quantized(config: pql.QuantConfig = CONFIG, name: str = "llama", **options) -> torch.nn.Module:
    model = tiny_model(name, torch.float32)
    return pql.quantize_model(
        model, config, progress=False, **{"transforms": TRANSFORMS, "calibration": DATA} | options
    )


def names_of(model: torch.nn.Module) -> list[str]:
    return [each["transform"] for each in model.config.quantlayers_transforms]


def trained(model: torch.nn.Module, folder) -> None:
    """An adapter that does something, saved."""
    adapted = peft.get_peft_model(model, LORA)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    adapted.save_pretrained(folder)


def test_quantize_model_transforms_first_and_then_quantizes():
    model = tiny_model("llama", torch.float32)
    pql.transform_model(model, TRANSFORMS, config=CONFIG, calibration=DATA, progress=False)
    pql.quantize_model(model, CONFIG, calibration=DATA, progress=False)
    assert torch.equal(logits(model), logits(quantized()))
    assert names_of(model) == NAMES


@all_methods
def test_a_quantized_model_is_saved_and_loaded_with_what_was_done(method, tmp_path):
    data = DATA if method in methods_for("calibrated") else None
    model = quantized(quick_config(method), transforms=pql.Rotation(), calibration=data)
    pql.save_model(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert names_of(loaded) == ["rotation"]


@pytest.mark.parametrize("name", ["llama tied", "gemma3", "gpt2", "qwen3_moe"])
def test_a_transformed_float_model_is_an_ordinary_one_of_its_class(name, tmp_path):
    model = tiny_model(name, torch.float32)
    before = logits(model)
    transform = pql.AWQScales(n_grid=2) if name == "gemma3" else pql.Rotation()
    pql.transform_model(model, transform, config=CONFIG, calibration=DATA, progress=False)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert change(logits(loaded), before) < 1e-4
    assert names_of(loaded) == [transform.name]
    pql.quantize_model(loaded, CONFIG, progress=False)
    assert names_of(loaded) == [transform.name]


def test_an_adapter_says_which_transforms_its_base_has_and_another_base_gives_a_warning(tmp_path):
    trained(quantized(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft.PeftModel.from_pretrained(quantized(), tmp_path)
    with pytest.warns(
        UserWarning, match="its transforms are none, and those of the adapter's base rotation, awq_scales"
    ):
        peft.PeftModel.from_pretrained(quantized(transforms=None), tmp_path)
    with pytest.warns(UserWarning, match="its transforms are rotation, and"):
        peft.PeftModel.from_pretrained(quantized(transforms=TRANSFORMS[:1]), tmp_path)


def test_the_same_holds_for_an_adapter_on_the_float_model(tmp_path):
    def float_model() -> torch.nn.Module:
        return pql.transform_model(tiny_model("llama", torch.float32), pql.Rotation())

    trained(float_model(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft.PeftModel.from_pretrained(float_model(), tmp_path)
    with pytest.warns(UserWarning, match="was trained on the base .* its transforms are none"):
        peft.PeftModel.from_pretrained(tiny_model("llama", torch.float32), tmp_path)


def test_a_model_without_transforms_keeps_no_record_of_them(tmp_path):
    trained(quantized(transforms=None), tmp_path)
    assert "transforms" not in (tmp_path / "quantlayers_base.json").read_text()
    model = tiny_model("llama", torch.float32)
    trained(model, tmp_path / "float")
    assert not (tmp_path / "float" / "quantlayers_base.json").exists()


def test_an_adapter_on_a_transformed_base_is_merged_at_the_same_bits(tmp_path):
    model = quantized(pql.HQQConfig(nbits=8, group_size=8))
    trained(model, tmp_path)
    adapted = peft.PeftModel.from_pretrained(quantized(pql.HQQConfig(nbits=8, group_size=8)), tmp_path).eval()
    expected = logits(adapted)
    merged, _ = pql.merge_back(adapted)
    assert change(logits(merged), expected) < 0.03
    pql.save_model(merged, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded), logits(merged))
    assert names_of(loaded) == NAMES


def test_a_refused_config_leaves_the_weights_and_the_record_alone():
    model = tiny_model("llama", torch.float32)
    before = logits(model)
    with pytest.raises(ValueError, match="matches no module"):
        pql.quantize_model(model, pql.HQQConfig(skip_modules=["nothing"]), transforms=pql.Rotation(), progress=False)
    with pytest.raises(ValueError, match="calibration is not possible"):
        pql.quantize_model(
            model, pql.HQQConfig(group_size=8, axis=0), transforms=pql.Rotation(), calibration=DATA, progress=False
        )
    assert torch.equal(logits(model), before)
    assert not hasattr(model.config, "quantlayers_transforms")


def test_a_model_with_adapters_is_not_transformed():
    model = peft.get_peft_model(tiny_model("llama", torch.float32), LORA)
    with pytest.raises(ValueError, match="carries PEFT adapters"):
        pql.transform_model(model, pql.Rotation())


def test_loftq_refuses_float_weights_without_the_transforms_of_the_base(tmp_path):
    config, plain = pql.HQQConfig(nbits=2, group_size=16), tiny_model("llama", torch.float32)
    plain.save_pretrained(tmp_path / "plain")
    scaled = pql.transform_model(
        tiny_model("llama", torch.float32), pql.AWQScales(n_grid=2), config=config, calibration=DATA, progress=False
    )
    scaled.save_pretrained(tmp_path / "scaled")
    adapted = peft.get_peft_model(pql.quantize_model(scaled, config, progress=False), LORA)
    for float_model in (plain, tmp_path / "plain", str(tmp_path / "plain")):
        with pytest.raises(ValueError, match=r"other transforms \(none\) than the model .* \(awq_scales\)"):
            pql.initialize_loftq(adapted, float_model, progress=False)
    results = pql.initialize_loftq(adapted, tmp_path / "scaled", progress=False)
    assert all(result.error_after < result.error_before for result in results)


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": "1KB"},
        {"budget": [3]},
        {"budget": "nowhere.json"},
        {"budget": "another model's"},
        {"calibration": DATA.index_fill(0, torch.tensor([20]), 10_000), "transforms": [pql.Permutation()]},
    ],
    ids=["too small", "no budget", "no file", "of another model", "ids beyond the vocabulary"],
)
def test_what_is_refused_is_refused_before_a_transform(wrong):
    if wrong.get("budget") == "another model's":
        plan = pql.plan_bits(tiny_model("gpt2", torch.float32), DATA, average=6.0, config=CONFIG, progress=False)
        wrong = {"budget": plan}
    model = tiny_model("llama", torch.float32)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, TypeError, FileNotFoundError)):
        pql.quantize_model(
            model, CONFIG, progress=False, **{"transforms": TRANSFORMS, "calibration": DATA, "budget": 6.0} | wrong
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert getattr(model.config, "quantlayers_transforms", None) is None


@pytest.mark.parametrize("options", [{}, {"budget": 6.0}], ids=["transforms", "transforms and a budget"])
@pytest.mark.parametrize("is_endless", [False, True])
def test_a_generator_is_read_once_and_serves_all_that_reads_the_data(options, is_endless):
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in DATA.split(4)]
    stream = (batch for batch in (itertools.cycle(batches) if is_endless else batches))

    def calibrated(data):
        return quantized(calibration=pql.Calibration(data=data, n_tokens=800, sequence_length=20), **options)

    assert torch.equal(logits(calibrated(stream)), logits(calibrated(batches)))
