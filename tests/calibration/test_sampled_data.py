"""Calibration data that a model samples itself."""

import pytest
import torch
from _tiny_models import tiny_model as tiny_class
from integrations.tiny import tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import peft_quantlayers as pql
from peft_quantlayers.calibration.sampled_data import MESSAGE


class Tokenizer:
    """Sixty words; a text begins with token 1, a chat's message of the user after tokens 1, 2, 3."""

    bos_token_id, all_special_ids = 1, [0, 1, 2, 3]

    def __init__(self, chat_template: str | None = "there is one") -> None:
        self.chat_template = chat_template

    def __call__(self, text: str, *, add_special_tokens: bool = True):
        ids = [1, 2, 3] if text.startswith("<") else [50]
        return type("Encoding", (), {"input_ids": [1, *ids] if add_special_tokens else ids})

    def apply_chat_template(self, messages, *, tokenize: bool) -> str:
        assert not tokenize
        return f"<s><user>{messages[0]['content']}</user>"


def sampled(model: nn.Module, tokenizer=None, **fields) -> torch.Tensor:
    options = {"n_tokens": 400, "sequence_length": 40, "batch_size": 4, "progress": False} | fields
    return pql.sample_calibration_data(model, tokenizer, **options)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_is_the_models_own_text_in_whole_sequences(family):
    model = tiny_model(family).train()
    own = model.generation_config
    own.eos_token_id = list(range(model.config.vocab_size))  # every token would end a sequence
    state = torch.get_rng_state()
    ids = sampled(model, n_tokens=390)
    assert ids.shape == (10, 40)
    assert ids.dtype == torch.int64
    assert len(set(map(tuple, ids.tolist()))) == 10
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is own
    assert model.training
    assert torch.equal(sampled(model, n_tokens=390), ids)
    assert not torch.equal(sampled(model, n_tokens=390, seed=1), ids)


def test_likely_tokens_are_sampled():
    """Nearly greedy: the tokens are those that the model gives the highest probability."""
    model = tiny_model("llama").eval()
    ids = sampled(model, top_p=1e-6)
    with torch.no_grad():
        assert (model(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean() > 0.95


def test_half_of_the_sequences_are_chats_where_there_is_a_template():
    model = tiny_model("llama")
    ids = sampled(model, Tokenizer())
    assert ids[:, 0].eq(1).all()
    is_chat = ids[:, 1:3].eq(torch.tensor([2, 3])).all(dim=1)
    assert is_chat.tolist() == [False, True] * 5
    assert not torch.isin(ids[~is_chat, 1], torch.tensor(Tokenizer.all_special_ids)).any()
    without = sampled(model, Tokenizer(chat_template=None))
    assert not without[:, 1:3].eq(torch.tensor([2, 3])).all(dim=1).any()
    assert MESSAGE not in str(ids)


@pytest.mark.parametrize(
    "create",
    [
        lambda: tiny_model("llama"),
        lambda: tiny_class("MixtralForCausalLM"),
        lambda: tiny_class("Gemma3ForConditionalGeneration"),
        lambda: tiny_class("MambaForCausalLM"),
    ],
)
def test_a_model_is_calibrated_on_it(create):
    model = create()
    pql.quantize_model(
        model, pql.HQQConfig(nbits=2, group_size=16), calibration=sampled(model, n_tokens=512), progress=False
    )
    assert pql.quantized_modules(model)


def test_no_more_positions_than_the_model_has():
    model = tiny_model("gpt2")
    assert sampled(model, sequence_length=10**6, n_tokens=1).shape == (1, model.config.n_positions)


@pytest.mark.parametrize(
    "create",
    [
        lambda: tiny_model("bert"),
        lambda: T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, vocab_size=64)),
        lambda: nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8)),
        # Of speech and of diffusion: they write, but by a ``generate`` of their own.
        lambda: tiny_class("CsmForConditionalGeneration"),
        lambda: tiny_class("DiffusionGemmaForBlockDiffusion"),
    ],
)
def test_a_model_that_writes_no_text_is_refused(create):
    with pytest.raises(ValueError, match="does not write text"):
        sampled(create())


def test_a_model_with_an_adapter_writes_with_it():
    model = tiny_model("llama")
    own, without = model.generation_config, sampled(model)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    modes = [module.training for module in peft_model.modules()]
    with_adapter = sampled(peft_model)
    assert not torch.equal(with_adapter, without)
    with peft_model.disable_adapter():
        assert torch.equal(sampled(peft_model), without)
    assert peft_model.get_base_model().generation_config is own
    assert [module.training for module in peft_model.modules()] == modes


@pytest.mark.parametrize(
    "fields", [{"n_tokens": 0}, {"temperature": 0.0}, {"top_p": 1.5}, {"batch_size": 0}, {"sequence_length": 1}]
)
def test_wrong_arguments_are_named(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        sampled(tiny_model("llama"), **fields)


def test_sequences_that_a_texts_beginning_fills_are_refused():
    assert sampled(tiny_model("llama"), sequence_length=2).shape == (200, 2)
    with pytest.raises(ValueError, match=r"sequence_length=2 leaves nothing to write: a text begins with 2 tokens"):
        sampled(tiny_model("llama"), Tokenizer(), sequence_length=2)
