"""Expressions that never end on a model's names are refused before PEFT tries them."""

import json
import shutil
import time

import pytest
from golden import models
from golden.models import FILES
from peft import LoraConfig, PeftModel, get_peft_model

from peft_quantlayers import QuantScalesConfig
from peft_quantlayers.integrations import pattern_check

BOMB = "(([a-z._0-9])+)+X"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(pattern_check, "CPU_SECONDS", 0.2)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=BOMB),
        LoraConfig(target_modules=["q_proj"], exclude_modules=BOMB),
        LoraConfig(target_modules=["q_proj"], rank_pattern={BOMB: 3}),
        LoraConfig(target_modules=["q_proj"], alpha_pattern={BOMB: 3}),
        LoraConfig(target_modules=["q_proj"], modules_to_save=[BOMB]),
        QuantScalesConfig(target_modules=BOMB),
        QuantScalesConfig(exclude_modules=BOMB),
        QuantScalesConfig(target_modules=".*.*.*.*.*.*.*.*.*.*.*.*X"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_an_endless_expression_is_refused_with_its_field(config):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"=.*does not end within.*Name the modules in a list.*not changed"):
        get_peft_model(models.load("hqq"), config)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("adapter", ["lora", "quant_scales"])
def test_one_in_a_saved_adapter_is_refused_too(adapter, tmp_path):
    folder = shutil.copytree(FILES / adapter, tmp_path / adapter)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": BOMB}))
    with pytest.raises(ValueError, match="does not end within"):
        PeftModel.from_pretrained(models.load("hqq"), folder)


@pytest.mark.parametrize(
    "target", [r".*layers\.\d+\.(self_attn|mlp)\..*(q|up)_proj", "all-linear", ["q_proj", "up_proj"]]
)
def test_ordinary_expressions_and_names_do_what_they_did(target, monkeypatch):
    calls, run = [], pattern_check.subprocess.run

    def counted(*args, **kwargs):
        calls.append(args)
        return run(*args, **kwargs)

    monkeypatch.setattr(pattern_check.subprocess, "run", counted)
    model = get_peft_model(models.load("hqq"), LoraConfig(target_modules=target))
    assert len(model.base_model.targeted_module_names) == (14 if target == "all-linear" else 4)
    assert len(calls) == ("\\d" in target)


def test_what_is_no_expression_is_left_to_peft():
    with pytest.raises(Exception, match=r"repeat|multiple|nothing"):
        get_peft_model(models.load("hqq"), LoraConfig(target_modules="**+{"))
