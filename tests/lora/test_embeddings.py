"""PEFT on models with quantized embeddings: LoRA on table and head, trained tokens, merges, and what is refused."""

import copy
import json
import warnings

import pytest
import torch
from _tiny_models import first_float, tiny_model
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from torch import nn

from peft_quantlayers import HQQConfig, merge_back, prepare_model_for_kbit_training, quantize_model, save_model
from peft_quantlayers.layers import QuantizedEmbedding
from peft_quantlayers.lora.base_fingerprint import AnotherBaseWarning
from peft_quantlayers.lora.embedding_layer import LoraQuantizedEmbedding

CONFIG = HQQConfig(nbits=4, quantize_embeddings=8)
UNTIED, TIED = "LlamaForCausalLM", "Gemma3ForCausalLM"
LORA = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])
IDS = torch.arange(40, 52)[None]
EVALUATED = torch.arange(40, 52).repeat(12)

pytestmark = pytest.mark.filterwarnings("ignore:Model (has|with)", "ignore:Setting `save_embedding_layers`")


def quantized(name: str = UNTIED, config: HQQConfig = CONFIG) -> nn.Module:
    return quantize_model(tiny_model(name), config, progress=False)


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return first_float(model(input_ids=IDS, use_cache=False))


def trained(model: nn.Module, config: object) -> PeftModel:
    peft_model = get_peft_model(model, copy.deepcopy(config)).train()
    optimizer = torch.optim.SGD([each for each in peft_model.parameters() if each.requires_grad], lr=0.3)
    for _ in range(3):
        peft_model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return peft_model.eval()


@pytest.mark.parametrize("name", [UNTIED, TIED])
def test_lora_on_the_table_trains_saves_and_loads(name, tmp_path):
    model = quantized(name)
    before = outputs(model)
    peft_model = trained(model, LORA)
    assert isinstance(model.get_input_embeddings(), LoraQuantizedEmbedding)
    after = outputs(peft_model)
    assert not torch.equal(after, before)
    with peft_model.disable_adapter():
        assert torch.equal(outputs(peft_model), before)
    peft_model.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(quantized(name), tmp_path).eval()), after)


@pytest.mark.parametrize("name", [UNTIED, TIED])
def test_a_merge_into_the_table_is_undone_to_the_bit(name):
    model = quantized(name)
    codes = model.get_input_embeddings().codes.clone()
    peft_model = trained(model, LoraConfig(r=4, target_modules=["embed_tokens"]))
    expected = outputs(peft_model)
    peft_model.merge_adapter()
    table = model.get_input_embeddings().get_base_layer()
    assert not torch.equal(table.codes, codes)
    if name == UNTIED:
        assert (outputs(peft_model) - expected).norm() < 0.02 * expected.norm()
    peft_model.unmerge_adapter()
    assert torch.equal(table.codes, codes)
    assert torch.equal(outputs(peft_model), expected)


@pytest.mark.parametrize("strategy", ["auto", "requantize", "dense"])
@pytest.mark.parametrize("config", [LORA, LoraConfig(r=4, target_modules=["embed_tokens"], use_dora=True)])
def test_merge_back_reports_on_the_table_and_leaves_rows_without_a_delta(strategy, config, tmp_path):
    model = quantized()
    codes, before = model.get_input_embeddings().codes.clone(), outputs(model)
    peft_model = trained(model, config)
    expected = outputs(peft_model)
    merged, report = merge_back(peft_model, strategy=strategy, evaluate_on=EVALUATED, progress=False)
    assert report.capture.kl_adapter_merged < 0.3 * report.capture.kl_adapter_base
    (layer,) = [each for each in report.layers if each.name == "model.embed_tokens"]
    assert layer.strategy == ("dense" if strategy == "dense" else "requantize")
    assert layer.delta_retained > 0.95
    assert (outputs(merged) - expected).norm() < 0.5 * (expected - before).norm()
    if strategy == "dense":
        assert type(merged.get_input_embeddings()) is nn.Embedding
        return
    table = merged.get_input_embeddings()
    assert type(table) is QuantizedEmbedding
    changed = (table.codes != codes).any(1).nonzero().flatten()
    if not config.use_dora:  # which scales every row
        assert set(changed.tolist()) <= set(IDS.flatten().tolist())
    save_model(merged, tmp_path / "merged")
    loaded = type(merged).from_pretrained(tmp_path / "merged")
    assert torch.equal(outputs(loaded), outputs(merged))


def test_other_strategies_are_refused_for_a_table_by_name():
    peft_model = trained(quantized(), LORA)
    expected = outputs(peft_model)
    with pytest.raises(ValueError, match=r"embed_tokens: strategy='keep' is for LoRA on quantized layers"):
        merge_back(peft_model, strategy="keep", progress=False)
    assert torch.equal(outputs(peft_model), expected)


@pytest.mark.parametrize("is_tying", [False, True])
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_merging_into_one_copy_of_tied_rows_is_refused(targets, is_tying):
    peft_model = trained(quantized(TIED), LoraConfig(r=4, target_modules=targets, ensure_weight_tying=is_tying))
    expected = outputs(peft_model)
    with pytest.raises(ValueError, match="shares its weight with another layer"):
        merge_back(peft_model, progress=False)
    assert torch.equal(outputs(peft_model), expected)


def test_lora_on_a_head_of_its_own_is_merged_as_on_any_layer():
    model = quantized()
    before = outputs(model)
    peft_model = trained(model, LoraConfig(r=4, target_modules=["lm_head"]))
    expected = outputs(peft_model)
    merged, report = merge_back(peft_model, progress=False)
    assert [layer.name for layer in report.layers] == ["lm_head"]
    assert (outputs(merged) - expected).norm() < 0.5 * (expected - before).norm()


@pytest.mark.parametrize("name", [UNTIED, TIED])
def test_all_linear_means_neither_table_nor_head(name):
    peft_model = get_peft_model(quantized(name), LoraConfig(target_modules="all-linear"))
    assert not any("embed_tokens" in target or "lm_head" in target for target in peft_model.targeted_module_names)


@pytest.mark.parametrize("name", [UNTIED, TIED])
@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_modules_to_save_are_refused_by_name_and_the_model_is_as_before(name, modules):
    model = quantized(name)
    before = outputs(model)
    with pytest.raises(NotImplementedError, match=r"(embed_tokens|lm_head): .*modules_to_save.*skip_modules"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=modules))
    assert torch.equal(outputs(model), before)
    # The way out.
    model = quantized(name, HQQConfig(nbits=4, quantize_embeddings=8, skip_modules=["embed_tokens", "lm_head"]))
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=modules))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[41, 45]),
        TrainableTokensConfig(token_indices=[41, 45], target_modules=["embed_tokens"]),
    ],
)
@pytest.mark.parametrize("name", [UNTIED, TIED])
def test_trained_tokens_are_merged_into_their_rows_alone(name, config, tmp_path):
    model = quantized(name)
    codes, before = model.get_input_embeddings().codes.clone(), outputs(model)
    peft_model = trained(model, config)
    expected = outputs(peft_model)
    peft_model.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(quantized(name), tmp_path).eval()), expected)
    merged, _ = merge_back(peft_model, progress=False)
    table, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    assert (table.codes != codes).any(1).nonzero().flatten().tolist() == [41, 45]
    assert (table.codes is head.codes) == (name == TIED)
    assert (outputs(merged) - expected).norm() < 0.6 * (expected - before).norm()


@pytest.mark.parametrize("name", [UNTIED, TIED])
def test_preparing_for_training_gives_float32_rows_and_gradients_with_checkpointing(name):
    model = quantize_model(tiny_model(name).to(torch.bfloat16), CONFIG, progress=False)
    codes = model.get_input_embeddings().codes.clone()
    prepare_model_for_kbit_training(model)
    table = model.get_input_embeddings()
    assert table(IDS).dtype == torch.float32
    assert table.scale.dtype == torch.float16
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])).train()
    peft_model(input_ids=IDS, labels=IDS).loss.backward()
    grads = {name: each.grad for name, each in peft_model.named_parameters() if each.requires_grad}
    assert all(grad is not None for grad in grads.values())
    assert any("lora_embedding_A" in name and grad.any() for name, grad in grads.items())
    assert torch.equal(table.codes, codes)


def test_a_vocabulary_is_resized_before_adapters_and_its_new_tokens_are_trained():
    model = quantized(TIED)
    model.resize_token_embeddings(260)
    tokens = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[256, 257, 258, 259])
    ids = torch.tensor([[3, 256, 257, 258, 259, 4]])
    peft_model = get_peft_model(model, tokens).train()
    loss = peft_model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer = torch.optim.SGD([each for each in peft_model.parameters() if each.requires_grad], lr=0.01)
    optimizer.step()
    assert peft_model(input_ids=ids, labels=ids).loss < loss
    merged, _ = merge_back(peft_model, progress=False)
    assert merged.get_input_embeddings().num_embeddings == 260


def test_a_second_merge_after_a_write_leaves_nothing_of_the_first_when_it_is_undone():
    peft_model = get_peft_model(quantized(), LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False))
    peft_model.add_adapter("b", LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False))
    layer = peft_model.get_input_embeddings()
    table = layer.get_base_layer()
    before, delta = table.dequantize(), layer.get_delta_weight("default").detach()
    layer.merge(adapter_names=["default"])
    table.weight[7] = 1.0
    layer.merge(adapter_names=["b"])
    layer.unmerge()
    left = (table.dequantize() - before).norm(dim=1)
    assert layer.merged_adapters == []
    assert left[7] > 1
    assert torch.cat([left[:7], left[8:]]).norm() < 0.05 * delta.norm()
    # Merged again, it is undone to the bit again.
    codes = table.codes.clone()
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["b"])
    layer.unmerge()
    assert torch.equal(table.codes, codes)


@pytest.mark.parametrize("is_merged", [False, True])
def test_an_adapter_on_the_table_records_it_and_says_so_on_another_one(is_merged, tmp_path):
    peft_model = trained(quantized(), LORA)
    if is_merged:
        peft_model.merge_adapter()
    peft_model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "quantlayers_base.json").read_text())["layers"]
    assert "model.embed_tokens" in record
    with warnings.catch_warnings():
        warnings.simplefilter("error", AnotherBaseWarning)
        PeftModel.from_pretrained(quantized(), tmp_path)
    other = quantized()
    other.model.embed_tokens.weight[3] = 0.5
    with pytest.warns(AnotherBaseWarning, match=r"model\.embed_tokens have other codes"):
        PeftModel.from_pretrained(other, tmp_path)
