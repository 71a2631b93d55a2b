"""Estimates of memory, disk and time agree with what the work itself takes, and cost no weights."""

import copy

import pytest
import torch
from _tiny_models import tiny_model as tiny_class
from integrations.tiny import tiny_model
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.cli.trl_trainers import trainer_loss
from peft_quantlayers.estimate import (
    calibration_time,
    estimate_merging,
    estimate_quantizing,
    estimate_training,
    merge_estimate,
)
from peft_quantlayers.estimate.live_bytes import LiveBytes
from peft_quantlayers.estimate.meta_model import one_block_model
from quantlayers_kernels import tiled

CONFIG = pql.HQQConfig(nbits=4, group_size=16)
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
FAMILIES = ("llama", "gpt2")


def on_meta(family="llama"):
    model = tiny_model(family).to("meta")
    model.tie_weights()
    return model


def measured_training(family, *, batch_size, sequence_length, checkpointing):
    """Peak bytes of the tensors of a step, and bytes of the adapter, in memory."""
    model = pql.quantize_model(tiny_model(family), CONFIG, progress=False)
    pql.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    model = get_peft_model(model, copy.deepcopy(LORA)).train()
    ids = torch.randint(3, 100, (batch_size, sequence_length))
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        model(input_ids=ids, labels=ids).loss.backward()
    return live.peak, sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_on_the_meta_device_takes_what_a_step_in_memory_takes(
    family, checkpointing, set_tile_elements, monkeypatch
):
    set_tile_elements(256)  # a tile, which operators keep for the next product, may have the size of a tiny model
    monkeypatch.setattr(tiled, "_SPARE", tiled._Spare())
    sizes = {"batch_size": 3, "sequence_length": 24}
    found = estimate_training(
        on_meta(family), CONFIG, LORA, use_gradient_checkpointing=checkpointing, is_timed=False, **sizes
    )
    peak, adapter = measured_training(family, checkpointing=checkpointing, **sizes)
    assert not found.notes
    assert found.memory["adapter"] == found.disk == adapter
    assert found.memory["optimizer"] == 2 * adapter  # AdamW's two moments
    counted = found.peak - found.memory["libraries"] - found.memory["optimizer"]
    assert counted == pytest.approx(peak, rel=0.1)


def test_more_tokens_take_more_and_recomputing_takes_less():
    def activations(checkpointing, n_tokens):
        found = estimate_training(
            on_meta(), CONFIG, LORA, sequence_length=n_tokens, use_gradient_checkpointing=checkpointing, is_timed=False
        )
        return found.memory["gradients and activations"]

    assert activations(False, 64) > 1.5 * activations(False, 32)
    assert activations(True, 64) < 0.8 * activations(False, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_disk_that_quantizing_takes_is_the_size_of_the_file(family, tmp_path):
    model = tiny_model(family)
    found = estimate_quantizing(on_meta(family), CONFIG)
    pql.save_model(pql.quantize_model(model, CONFIG, progress=False), tmp_path)
    header = 8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    size = (tmp_path / "model.safetensors").stat().st_size - header
    assert found.disk == pytest.approx(size, rel=0.1)
    assert found.seconds > 0
    assert estimate_quantizing(on_meta(family), CONFIG, calibration_tokens=4096).peak > found.peak


def test_calibration_takes_what_is_estimated(tmp_path):
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "float")
    ids = torch.randint(0, 256, (32, 128))
    calibration = pql.Calibration(data=ids, n_tokens=ids.numel(), sequence_length=128)
    with LiveBytes() as live:
        pql.quantize_checkpoint(
            tmp_path / "float", tmp_path / "quantized", CONFIG, calibration=calibration, progress=False
        )
    found = estimate_quantizing(model.to("meta"), CONFIG, calibration_tokens=ids.numel())
    counted = sum(size for name, size in found.memory.items() if name != "libraries")
    assert counted == pytest.approx(live.peak, rel=0.2)


def seconds_of_calibration(monkeypatch, model, n_tokens, **times):
    """With these seconds for each kind of layer, and passes that take none."""
    found = calibration_time._Times(**({"token": 0.0, "layer": 0.0, "row": 0.0} | times))
    monkeypatch.setattr(calibration_time, "_times", lambda spec, inputs: found)
    monkeypatch.setattr(calibration_time, "seconds_of_product", lambda n_tokens: 0.0)
    return estimate_quantizing(model, CONFIG, calibration_tokens=n_tokens).seconds


def test_the_time_of_calibration_counts_inputs_layers_and_rows(monkeypatch):
    model = on_meta()
    layers = model.config.num_hidden_layers
    rows = sum(len(module.weight) for name, module in model.named_modules() if "proj" in name)
    assert seconds_of_calibration(monkeypatch, model, 100, layer=1.0) == 7 * layers
    assert seconds_of_calibration(monkeypatch, model, 100, row=1.0) == rows
    # q, k and v read one input, and gate and up another; o and down have one each.
    assert seconds_of_calibration(monkeypatch, model, 100, token=1.0) == 4 * layers * 100
    assert all(parameter.is_meta for parameter in model.parameters())


def test_layers_of_a_model_that_cannot_be_followed_have_inputs_of_their_own(monkeypatch):
    model = on_meta()
    monkeypatch.setattr(type(model), "forward", lambda self, **inputs: 1 / 0)
    assert seconds_of_calibration(monkeypatch, model, 100, token=1.0) == 7 * model.config.num_hidden_layers * 100


@pytest.mark.parametrize("config", [CONFIG, pql.AQLMConfig(nbits_per_codebook=4)])
def test_the_time_of_calibration_is_measured_and_grows_with_the_tokens(config):
    few, many = (estimate_quantizing(on_meta(), config, calibration_tokens=n).seconds for n in (1024, 2**24))
    assert 0 < few < many


def test_wide_layers_are_scaled_from_narrower_ones(monkeypatch):
    sizes = []
    monkeypatch.setattr(calibration_time, "_INPUTS", 64)

    def measured(spec, inputs):
        sizes.append(inputs)
        return calibration_time._Times(token=inputs**2, layer=inputs**3, row=inputs**5)

    monkeypatch.setattr(calibration_time, "_measured", measured)
    found = calibration_time._times(CONFIG.spec_for("layer"), 512)
    assert sizes == [64, 32]
    # Rows at most with the square.
    assert found == calibration_time._Times(token=512**2, layer=512**3, row=64**5 * 8**2)


def test_the_time_of_merging_is_that_of_merges(monkeypatch):
    merged = []
    own = merge_estimate.merge_back
    monkeypatch.setattr(
        merge_estimate, "merge_back", lambda model, **options: merged.append(model) or own(model, **options)
    )
    assert estimate_merging(on_meta(), CONFIG, rank=4).seconds > 0
    assert len(merged) >= 2


def test_a_quantized_model_needs_no_config_and_a_float_one_does():
    model = pql.quantize_model(tiny_model(), CONFIG, progress=False).to("meta")
    assert estimate_merging(model, None, rank=4).memory["weights"] == pql.summary(model).nbytes
    with pytest.raises(ValueError, match="float model: say how it will be quantized"):
        estimate_merging(on_meta(), None)


def test_one_block_has_the_layers_of_a_block_and_finite_numbers():
    block = one_block_model(on_meta(), CONFIG)
    assert block.config.num_hidden_layers == 1
    assert len(pql.quantized_modules(block)) == 7
    assert torch.isfinite(block(torch.randint(0, 100, (1, 8))).logits).all()
    assert one_block_model(tiny_class("T5ForConditionalGeneration").to("meta"), CONFIG) is None


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "T5ForConditionalGeneration"])
def test_a_model_that_does_not_predict_the_next_token_is_estimated_without_activations_and_says_so(name):
    found = estimate_training(tiny_class(name).to("meta"), CONFIG, LoraConfig(r=4, target_modules="all-linear"))
    assert found.memory["adapter"] > 0
    assert found.seconds is None
    assert found.notes[0].startswith("without activations")


def test_a_time_is_given_where_the_model_is_a_stack_of_blocks():
    timed = estimate_training(on_meta(), CONFIG, LORA, sequence_length=16)
    assert timed.seconds > 0
    assert "a step" in str(timed)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_the_trainer_that_train_runs_is_counted(family):
    pytest.importorskip("trl", reason="the extra `train` is not installed")
    sizes = {"batch_size": 3, "sequence_length": 24}
    found = estimate_training(on_meta(family), CONFIG, LORA, is_timed=False, loss_of=trainer_loss, **sizes)
    assert not found.notes
    model = get_peft_model(pql.quantize_model(tiny_model(family), CONFIG, progress=False), copy.deepcopy(LORA)).train()
    pql.prepare_model_for_kbit_training(model)
    ids = torch.randint(3, 100, (3, 24))
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        trainer_loss(model, ids).backward()
    counted = found.peak - found.memory["libraries"] - found.memory["optimizer"]
    assert counted == pytest.approx(live.peak, rel=0.1)


def test_half_precision_that_is_cast_for_training_is_counted_twice():
    model = on_meta().to(torch.bfloat16)
    model.tie_weights()
    dense = pql.summary(model, CONFIG).nbytes - sum(each.nbytes for each in pql.summary(model, CONFIG).quantized)
    found = estimate_training(model, CONFIG, LORA, is_timed=False)
    assert found.memory["weights as stored"] == pytest.approx(dense, rel=0.01)  # its files stay mapped
    assert estimate_training(on_meta(), CONFIG, LORA, is_timed=False).memory["weights as stored"] == 0
