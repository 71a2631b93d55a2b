"""Mistakes in calls of public functions, as parameters of tests, and models to make them on."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from integrations.tiny import tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM

import peft_quantlayers as pql
from peft_quantlayers import AQLMConfig, Calibration, HQQConfig

CONFIG = HQQConfig(nbits=4, group_size=32)
IDS = torch.arange(600) % 100


def letters(text: str, **options: Any) -> dict[str, list[int]]:
    return {"input_ids": [ord(letter) % 128 for letter in text]}


class Tokenizer:
    """As much of a tokenizer as a mistaken argument shows."""

    chat_template = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return letters(text)

    def decode(self, ids: list[int]) -> str:
        return ""

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        raise AssertionError("there is no template")


def dense() -> nn.Module:
    return tiny_model()


def quantized() -> nn.Module:
    return pql.quantize_model(tiny_model(), CONFIG, progress=False)


def adapted(config: Any = CONFIG, **fields: Any) -> nn.Module:
    base = pql.quantize_model(tiny_model(), config, progress=False)
    fields = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | fields
    return get_peft_model(base, LoraConfig(**fields)).eval()


def aqlm() -> nn.Module:
    return pql.quantize_model(tiny_model(), AQLMConfig(nbits_per_codebook=4, rounds=0), progress=False)


def nothing() -> None:
    return None


def bits(model: Any) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        return {}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state | {"grad": [parameter.requires_grad for parameter in model.parameters()], "text": repr(model)}


def assert_unchanged(model: Any, before: dict[str, Any]) -> None:
    after = bits(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, name


def mistake(
    call: Callable[[Any], Any], error: type[Exception], *words: str, on: Callable[[], Any] = nothing, name: str
) -> Any:
    return pytest.param(on, call, error, words, id=name)


# In the arguments of a call: what ``on`` makes.
MODEL: Any = object()


class Calls:
    """Makes mistakes in calls of ``function``: each is given the arguments ``usual`` unless it has ``args``.

    ``on`` makes the model, where one is among the arguments.
    """

    def __init__(self, function: Callable[..., Any], *usual: Any, on: Callable[[], Any] = nothing) -> None:
        self.function, self.usual, self.on = function, usual, on

    def __call__(
        self,
        name: str,
        error: type[Exception],
        *words: str,
        args: Sequence[Any] | None = None,
        on: Callable[[], Any] | None = None,
        **options: Any,
    ) -> Any:
        given = self.usual if args is None else args
        is_used = any(value is MODEL for value in (*given, *options.values()))

        def call(model: Any) -> Any:
            def put(value: Any) -> Any:
                return model if value is MODEL else value

            return self.function(*map(put, given), **{key: put(value) for key, value in options.items()})

        return mistake(call, error, *words, on=on or (self.on if is_used else nothing), name=name)


def short_bert() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(**sizes, vocab_size=128, max_position_embeddings=16))


def meta_model() -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(tiny_model().config)


def calibrated_with(data: Any, **fields: Any) -> Callable[[Any], Any]:
    return lambda model: pql.quantize_model(
        model, CONFIG, calibration=Calibration(data=data, **fields), progress=False
    )


def assert_refused(
    on: Callable[[], Any], call: Callable[[Any], Any], error: type[Exception], words: Sequence[str]
) -> None:
    """``call`` raises just this error, in a sentence with these words, and leaves what ``on`` made as it was."""
    model = on()
    before = bits(model) if model is None or not any(p.is_meta for p in model.parameters()) else None
    with pytest.raises(error) as refused:
        call(model)
    said = str(refused.value)
    assert type(refused.value) is error
    for word in words:
        assert word in said
    assert re.search(r"[.)?]$", said.strip()), "a sentence"
    if before is not None:
        assert_unchanged(model, before)
