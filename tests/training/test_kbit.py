"""Preparing for training: adapters stay as they are, experts keep their dtype, and one line says the cost."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from integrations.tiny import training_arguments
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    GptOssConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    Trainer,
)

import peft_quantlayers as pql
from peft_quantlayers.integrations import before_training
from peft_quantlayers.training import kbit

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXTURES = {
    "mixtral": MixtralConfig(**SIZES, **EXPERTS),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "gpt_oss": GptOssConfig(**SIZES, **EXPERTS),
    "granitemoe": GraniteMoeConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, **EXPERTS),
    "dbrx": DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        vocab_size=64,
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
    ),
}


def quantized(config, dtype: torch.dtype = torch.bfloat16, **fields) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return pql.quantize_model(model, pql.HQQConfig(nbits=4, group_size=16, **fields), progress=False)


def ids() -> torch.Tensor:
    return torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=ids(), labels=ids()).loss


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("skipped", [None, ["experts"]])
def test_experts_keep_their_dtype_and_the_model_trains(name, skipped):
    model = quantized(MIXTURES[name], skip_modules=skipped)
    expected = loss_of(model)
    before = {n: (p.dtype, p.nbytes) for n, p in model.named_parameters() if "experts" in n.split(".")}
    assert before
    pql.prepare_model_for_kbit_training(model)
    experts = {n: p for n, p in model.named_parameters() if "experts" in n.split(".")}
    assert {n: (p.dtype, p.nbytes) for n, p in experts.items()} == before
    assert any(p.dtype == torch.bfloat16 for p in experts.values()) or skipped is None
    assert model.get_output_embeddings().weight.dtype == torch.float32
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2)).train()
    loss = loss_of(model)
    torch.testing.assert_close(loss, expected.float(), rtol=2e-2, atol=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_one_line_says_how_much_memory_it_takes(caplog):
    model = quantized(LlamaConfig(**SIZES))
    before = sum(p.nbytes for p in model.parameters())
    with caplog.at_level(logging.WARNING):
        pql.prepare_model_for_kbit_training(model)
    added = sum(p.nbytes for p in model.parameters()) - before
    assert len(caplog.messages) == 1
    assert f"{added / 1e3:.0f} kB" in caplog.text
    assert "upcast=False" in caplog.text
    caplog.clear()
    pql.prepare_model_for_kbit_training(quantized(LlamaConfig(**SIZES)), upcast=False)
    assert not caplog.messages


@pytest.mark.parametrize("is_faster", [True, False])
def test_the_line_says_where_the_heads_product_is_faster_as_it_was(is_faster, caplog, monkeypatch):
    monkeypatch.setattr(kbit, "product_dtype", lambda dtype, device: dtype if is_faster else torch.float32)
    with caplog.at_level(logging.WARNING):
        pql.prepare_model_for_kbit_training(quantized(LlamaConfig(**SIZES)))
    assert ("the head's product is faster here" in caplog.text) == is_faster


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], bias="all"),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        pql.QuantScalesConfig(train=("scales", "norms")),
    ],
    ids=["lora", "trainable tokens", "prompt tuning", "scales"],
)
def test_a_model_with_an_adapter_trains_what_it_trained_before(config):
    model = get_peft_model(quantized(LlamaConfig(**SIZES)), config, autocast_adapter_dtype=False)
    before = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert before
    pql.prepare_model_for_kbit_training(model)
    after = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert after.keys() == before.keys()
    assert all(after[name] == dtype for name, dtype in before.items() if "lora" in name or "prompt" in name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    first = loss_of(model)
    first.backward()
    optimizer.step()
    assert loss_of(model) != first


def test_an_adapter_of_add_adapter_stays_trainable():
    model = quantized(LlamaConfig(**SIZES))
    model.add_adapter(LoraConfig(target_modules="all-linear"))
    before = [name for name, p in model.named_parameters() if p.requires_grad]
    pql.prepare_model_for_kbit_training(model)
    assert before
    assert [name for name, p in model.named_parameters() if p.requires_grad] == before


@pytest.mark.parametrize("after", [True, False])
def test_the_trainer_says_that_pefts_function_froze_the_adapter(after, caplog, tmp_path):
    import peft

    model = quantized(LlamaConfig(**SIZES), torch.float32)
    config = LoraConfig(target_modules=["q_proj"], r=2)
    if after:
        model = peft.prepare_model_for_kbit_training(get_peft_model(model, config))
    else:
        model = get_peft_model(peft.prepare_model_for_kbit_training(model), config)
    rows = [{"input_ids": row, "labels": row} for row in ids()]
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(model, training_arguments(tmp_path, steps=1, bf16=False), train_dataset=rows)
    assert ("no parameter of the model is trainable" in caplog.text) == after
    before = {name: p.clone() for name, p in model.named_parameters() if "lora" in name}
    if after:
        model.set_adapter("default")
        caplog.clear()
        trainer = Trainer(model, training_arguments(tmp_path, steps=1, bf16=False), train_dataset=rows)
        assert not caplog.text
    trainer.train()
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters() if "lora" in name)


def test_a_model_to_evaluate_with_is_not_warned_of(caplog, tmp_path):
    get_peft_model(quantized(LlamaConfig(**SIZES)), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(LlamaConfig(**SIZES)), tmp_path)
    with caplog.at_level(logging.WARNING):
        Trainer(loaded, training_arguments(tmp_path, steps=1, bf16=False))
    assert "trainable" not in caplog.text
    assert copy.deepcopy(loaded.get_base_model()).hf_quantizer.is_trainable


@pytest.mark.parametrize(("version", "said"), [(1, "FSDP1 joins"), (2, ""), (None, "every process holds the whole")])
def test_fsdp1_is_refused_before_training_and_none_is_warned_of(version, said, monkeypatch, tmp_path, caplog):
    model = get_peft_model(quantized(LlamaConfig(**SIZES)), LoraConfig(target_modules=["q_proj"]))
    arguments = training_arguments(tmp_path, steps=1, bf16=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(before_training, "fsdp_version", lambda: version)
    if version == 1:
        with pytest.raises(ValueError, match=rf"{said}.*Use FSDP2"):
            Trainer(model, arguments)
    else:
        Trainer(model, arguments)
        assert said in caplog.text
        assert bool(caplog.text) == bool(said)


@pytest.mark.parametrize(("kind", "version"), [(DistributedType.FSDP, 2), (DistributedType.MULTI_GPU, None)])
def test_the_fsdp_is_that_of_the_accelerator(kind, version, monkeypatch):
    state = SimpleNamespace(distributed_type=kind, fsdp_plugin=SimpleNamespace(fsdp_version=2))
    monkeypatch.setattr(before_training, "AcceleratorState", lambda: state)
    for is_there in (True, False):
        monkeypatch.setattr(before_training, "is_initialized", lambda is_there=is_there: is_there)
        assert before_training.fsdp_version() == (version if is_there else None)
