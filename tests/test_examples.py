"""Every example runs as it is, in a process of its own; the demo also on a tiny random model, so that CI can wait."""

import json
import os
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import orders_task
import pytest
import torch
from programs import run_program
from tiny_folder import byte_tokenizer, save_tiny_llama
from transformers import LlamaForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.cli.work import verb_parser

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name: str, *arguments: str) -> str:
    done = run_program(EXAMPLES / name, *arguments, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def number_after(label: str, output: str) -> float:
    return float(re.search(re.escape(label) + r"\s*([\d.]+)", output).group(1))


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def tiny_folder(tokenizer, tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"), tokenizer)


def test_no_order_is_both_trained_on_and_held_out():
    train, held_out = orders_task.make_orders(400, 100)
    assert len({order.answer for order in train + held_out}) == 500


def test_orders_are_the_same_every_time():
    assert orders_task.make_orders(20, 5) == orders_task.make_orders(20, 5)


def test_a_record_says_what_its_sentence_says():
    order = orders_task._order(orders_task.SENTENCES[0], "three", "red", "lamp", "Oslo", "Friday")
    assert order.prompt.startswith("Please send three red lamps to Oslo by Friday.\n")
    assert order.answer == " lamp/red*3>oslo@fri"


def test_only_the_answer_and_the_end_count_in_the_loss(tokenizer):
    train, _ = orders_task.make_orders(4, 1)
    for order, example in zip(train, orders_task.tokenize(train, tokenizer), strict=True):
        counted = [label for label in example["labels"] if label != orders_task.IGNORED]
        assert tokenizer.decode(counted) == order.answer + "<|end|>"
        assert tokenizer.decode(example["input_ids"]) == order.prompt + order.answer + "<|end|>"


def test_answer_loss_is_the_loss_transformers_computes(tokenizer, tiny_folder):
    model = LlamaForCausalLM.from_pretrained(tiny_folder)
    _, orders = orders_task.make_orders(1, 5)
    batch = orders_task.OrderCollator(tokenizer)(orders_task.tokenize(orders, tokenizer))
    with torch.no_grad():
        expected = model(**batch).loss.item()
    assert orders_task.answer_loss(model, tokenizer, orders, batch_size=2) == pytest.approx(expected, rel=1e-4)


def test_exact_match_counts_the_records_without_a_mistake(tokenizer, monkeypatch):
    _, orders = orders_task.make_orders(1, 4)
    answers = [orders[0].answer.strip(), orders[1].answer.strip(), "lamp", orders[3].answer.strip() + "!"]
    monkeypatch.setattr(orders_task, "write_answers", lambda *args, **kwargs: answers)
    assert orders_task.exact_match(None, tokenizer, orders) == 0.5


def test_answers_do_not_depend_on_the_batch(tokenizer, tiny_folder):
    model = LlamaForCausalLM.from_pretrained(tiny_folder)
    _, orders = orders_task.make_orders(1, 4)
    together = orders_task.write_answers(model, tokenizer, orders)
    assert together == orders_task.write_answers(model, tokenizer, orders, batch_size=1)


@pytest.mark.parametrize(
    ("options", "label"),
    [(["--nbits", "3"], "3 bits"), (["--method", "aqlm", "--calibrate", "--calibration-tokens", "1024"], "AQLM 2x8")],
    ids=["hqq", "aqlm"],
)
def test_the_demo_runs_on_another_model(options, label, tiny_folder, tmp_path):
    small = ["--model", str(tiny_folder), "--steps", "2", "--orders", "4", "--windows", "1"]
    output = run_example("demo.py", *small, *options, "--output", str(tmp_path))
    result = json.loads((tmp_path / "demo.json").read_text())
    names = [stage["name"] for stage in result["stages"]]
    merged = ["merged, same bits, no data", "merged, same bits, calibrated"]
    assert names == [
        "float",
        f"quantized, {label}",
        "finetuned, adapter beside it",
        "merged, dense",
        *merged[: 2 if result["calibrated"] else 1],
    ]
    assert all(name in output for name in names)
    assert all(check["logits_identical"] for check in result["saved"].values())
    sizes = {stage["name"]: stage["size_mb"] for stage in result["stages"]}
    assert sizes[names[-1]] == sizes[f"quantized, {label}"] < sizes["merged, dense"]
    dense = result["merges"][0]
    assert dense["strategy"] == "dense"
    assert dense["delta_retained"] == pytest.approx(1.0, abs=1e-3)
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_the_demo_by_verbs_runs_on_another_model_and_says_how_to_do_the_same(tiny_folder, tmp_path):
    small = ["--model", str(tiny_folder), "--steps", "2", "--orders", "4"]
    output = run_example("demo_verbs.py", *small, "--output", str(tmp_path), "--export", "dense")
    assert (tmp_path / "served" / "model.safetensors").exists()
    verbs = re.findall(r"^\$ peft-quantlayers (\w+)", output, re.M)
    assert verbs[:6] == ["quantize", "train", "merge", "evaluate", "evaluate", "chat"]
    assert "of 4 held-out orders right" in output
    assert "The same with another model" in output
    assert pql.verify_model(tmp_path / "merged") == []
    # The settings beside each output do the same again.
    for folder, verb in (("base", "quantize"), ("tuned", "train"), ("merged", "merge")):
        assert (tmp_path / folder / f"{verb}.yaml").exists()
    # Each command that it prints for another model has options that there are.
    for line in re.findall(r"^  peft-quantlayers (.*)", output, re.M):
        verb, *options = line.split()
        known = verb_parser(verb, import_module(f"peft_quantlayers.cli.verbs.{verb}")).names()
        assert {option[2:] for option in options if option.startswith("--")} <= known


@pytest.mark.real_model
def test_quantize_example():
    output = run_example("01_quantize.py")
    rows = re.findall(r"layers\s+([\d.]+) MB\s+perplexity\s+([\d.]+)", output)
    (float_mb, float_ppl), (four_mb, four_ppl), (mixed_mb, mixed_ppl) = [tuple(map(float, row)) for row in rows]
    assert four_mb < float_mb / 6
    assert four_mb < mixed_mb < float_mb / 4
    assert float_ppl < mixed_ppl < four_ppl < 1.4 * float_ppl


@pytest.mark.real_model
def test_lora_example():
    output = run_example("02_lora_trainer.py")
    before, after = number_after("before training:", output), number_after("after 8 steps:", output)
    assert after < before / 2
    assert number_after("saved and loaded:", output) == after


@pytest.mark.real_model
def test_merge_example():
    output = run_example("03_merge_and_save.py")
    adapter, kept = number_after("with the adapter:", output), number_after("as a low-rank branch:", output)
    assert number_after("merged into 4 bits:", output) == pytest.approx(adapter, rel=0.3)
    assert kept == pytest.approx(adapter, rel=0.01)
    assert 0.5 < number_after("capture", output) < 1
    assert number_after("saved and loaded:", output) == kept


@pytest.mark.real_model
@pytest.mark.skipif(not find_spec("xllamacpp"), reason="needs llama.cpp: pip install xllamacpp")
def test_serving_example():
    output = run_example("05_train_and_serve.py")
    trained = number_after("loss in training:", output)
    assert number_after("loss of the merged model:", output) == pytest.approx(trained, abs=2e-3)
    assert "5.00 after" in output
    assert ", exact." in output
    assert re.search(r"llama.cpp goes on with: +'.+'", output)


@pytest.mark.real_model
def test_chunked_loss_example():
    output = run_example("04_chunked_loss.py")
    rows = re.findall(r"loss ([\d.]+), peak (\d+) MB", output)
    (chunked, chunked_peak), (plain, plain_peak) = [tuple(map(float, row)) for row in rows]
    assert chunked == pytest.approx(plain, rel=1e-4)
    assert chunked_peak < plain_peak
