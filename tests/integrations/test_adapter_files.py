"""Adapters whose files are damaged, or do not fit their config, are refused with the file's name."""

import json
import math
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import peft_quantlayers as pql

from .tiny import tiny_model, token_ids

FILE = "adapter_model.safetensors"
KINDS = ("lora", "qalora", "aware", "scales")


def quantized() -> nn.Module:
    return pql.quantize_model(tiny_model(), pql.HQQConfig(nbits=4, group_size=16), progress=False)


def adapter(kind: str) -> PeftModel:
    if kind == "scales":
        config = pql.QuantScalesConfig(train=("scales", "zeros", "norms"))
    else:
        qalora = {"use_qalora": True, "qalora_group_size": 16} if kind == "qalora" else {}
        config = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False, **qalora)
    torch.manual_seed(1)
    model = get_peft_model(quantized(), config)
    if kind == "aware":
        pql.enable_merge_aware(model)
    return model.eval()


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    adapter(kind).save_pretrained(tmp_path)
    return tmp_path


def load(folder) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(quantized(), folder)


def edit_tensors(folder, change) -> None:
    tensors = load_file(folder / FILE)
    save_file(change(tensors), folder / FILE, metadata={"format": "pt"})


def edit_config(folder, **fields) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_an_intact_adapter_loads_as_it_was(kind, folder):
    with torch.no_grad():
        expected = adapter(kind)(token_ids()).logits
        assert torch.equal(load(folder)(token_ids()).logits, expected)


def test_a_missing_tensor(folder):
    edit_tensors(folder, lambda tensors: dict(list(tensors.items())[1:]))
    with pytest.raises(ValueError, match=rf"{FILE} lacks 1 tensor"):
        load(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_tensor_that_is_not_finite(value, folder):
    def spoil(tensors):
        next(iter(tensors.values())).view(-1)[0] = value
        return tensors

    edit_tensors(folder, spoil)
    with pytest.raises(ValueError, match=rf"{FILE}: .* holds NaN or Inf"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool])
def test_a_tensor_of_integers(dtype, folder):
    def relabel(tensors):
        name = next(name for name in tensors if "lora_B" in name or "scale" in name)
        return tensors | {name: tensors[name].to(dtype)}

    edit_tensors(folder, relabel)
    with pytest.raises(ValueError, match=rf"{FILE}: .* and no floats"):
        load(folder)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_file(length, folder):
    file = folder / FILE
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=rf"{FILE} is damaged or incomplete"):
        load(folder)


def test_a_tensor_of_another_shape(folder):
    edit_tensors(folder, lambda tensors: tensors | {name: tensors[name][:1] for name in list(tensors)[:1]})
    with pytest.raises(RuntimeError, match=rf"(?s){FILE}: .*size mismatch"):
        load(folder)


@pytest.mark.parametrize("kind", ["aware"], indirect=True)
def test_a_config_that_lost_its_targets(folder):
    edit_config(folder, target_modules=None)
    with pytest.raises(ValueError, match=rf"{FILE} holds .* for which adapter_config.json has no place"):
        load(folder)


@pytest.mark.parametrize("kind", ["scales"], indirect=True)
def test_a_config_that_lost_what_is_trained(folder):
    file = folder / "adapter_config.json"
    fields = json.loads(file.read_text())
    del fields["train"]
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"for which adapter_config.json has no place"):
        load(folder)


@pytest.mark.parametrize("kind", ["lora", "qalora", "aware"], indirect=True)
@pytest.mark.parametrize("alpha", [math.nan, math.inf, "8", None])
def test_an_alpha_that_is_no_number(alpha, folder):
    edit_config(folder, lora_alpha=alpha)
    with pytest.raises(ValueError, match=r"lora_alpha=.* must be a finite number"):
        load(folder)
    edit_config(folder, lora_alpha=8, alpha_pattern={"q_proj": alpha})
    with pytest.raises(ValueError, match=r"alpha_pattern.*q_proj.* must be a finite number"):
        load(folder)


@pytest.mark.parametrize("kind", ["lora"], indirect=True)
def test_a_second_adapter_is_checked_too(folder):
    model = load(folder)
    edit_tensors(folder, lambda tensors: dict(list(tensors.items())[1:]))
    with pytest.raises(ValueError, match=rf"{FILE} lacks 1 tensor"):
        model.load_adapter(folder, "second")


@pytest.mark.parametrize("kind", ["lora"], indirect=True)
def test_a_model_without_our_layers_is_left_to_peft(folder, tmp_path):
    edit_tensors(folder, lambda tensors: dict(list(tensors.items())[1:]))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(tiny_model(), folder)
