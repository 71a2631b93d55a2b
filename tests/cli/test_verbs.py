"""Each verb on a tiny model, in this process; what is wrong is one line and leaves nothing behind."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from commands import TEXT, printed, refused
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import peft_quantlayers as pql
from peft_quantlayers.cli import main
from peft_quantlayers.cli.answers import prompts_of
from peft_quantlayers.cli.verbs import evaluate, quantize
from peft_quantlayers.merging import MergeReport, advice
from peft_quantlayers.merging.strategies import STRATEGIES
from peft_quantlayers.streaming import quantize_files
from peft_quantlayers.streaming.checkpoint_parts import PartsOfModel
from quantlayers_cli import option_names

# ---- each verb


def test_quantize_gives_the_model_of_the_python_call(float_model, tmp_path, capsys):
    folder = tmp_path / "out"
    config = tmp_path / "q.yaml"
    config.write_text(
        yaml.safe_dump({"model": float_model, "nbits": 4, "group_size": 32, "overrides": {"down_proj": {"nbits": 8}}})
    )
    text = printed(capsys, ["quantize", str(config), "--output", str(folder), "--nbits", "3"])
    assert "hqq nbits=3" in text
    expected = pql.quantize_model(
        AutoModelForCausalLM.from_pretrained(float_model),
        pql.HQQConfig(nbits=3, group_size=32, overrides={"down_proj": {"nbits": 8}}),
        progress=False,
    )
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    assert (folder / "tokenizer.json").exists()
    # The settings that are saved beside it do the same again, whatever the defaults of a later version are.
    saved = yaml.safe_load((folder / "quantize.yaml").read_text())
    assert {field.name for field in dataclasses.fields(pql.HQQConfig) if field.default is not None} <= saved.keys()
    again = tmp_path / "again"
    assert main(["quantize", str(folder / "quantize.yaml"), "--output", str(again)]) == 0
    first, second = (load_file(each / "model.safetensors") for each in (folder, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_quantize_takes_embeddings_and_head_too_and_inspect_says_so(float_model, tmp_path, capsys):
    folder = tmp_path / "out"
    printed(capsys, ["quantize", float_model, str(folder), "--group_size", "32", "--quantize_embeddings", "8"])
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(found.get_input_embeddings(), pql.layers.QuantizedEmbedding)
    assert found.get_output_embeddings().spec.nbits == 8
    assert "hqq nbits=8" in printed(capsys, ["inspect", str(folder)])
    assert "quantize_embeddings" in refused(
        capsys, ["quantize", float_model, str(tmp_path / "no"), "--quantize_embeddings", "5"], 2
    )


def test_quantize_transforms_the_float_weights_first(float_model, text_file, tmp_path, capsys):
    folder = tmp_path / "out"
    data = ["--calibration.data", text_file, "--calibration.n_tokens", "512", "--calibration.sequence_length", "64"]
    printed(capsys, ["quantize", float_model, str(folder), "--group_size", "32", "--transforms", "[rotation]", *data])
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert [each["transform"] for each in found.config.quantlayers_transforms] == ["rotation"]
    assert "AWQScales measures inputs" in refused(
        capsys, ["quantize", float_model, str(tmp_path / "no"), "--transforms", "[awq_scales]"], 1
    )
    assert not (tmp_path / "no").exists()


def test_quantize_calibrated_with_another_method(float_model, text_file, tmp_path, capsys):
    small = ["--num_codebooks", "1", "--nbits_per_codebook", "4", "--rounds", "1"]
    data = ["--calibration.data", text_file, "--calibration.n_tokens", "512", "--calibration.sequence_length", "64"]
    found = json.loads(
        printed(capsys, ["quantize", float_model, str(tmp_path / "a"), "--method", "aqlm", *small, *data, "--json"])
    )
    assert found["quantized"][0]["layers"] == 14


def test_quantize_calibrated_goes_from_files_to_files_and_on_after_an_interruption(
    float_model, text_file, tmp_path, capsys, monkeypatch
):
    data = ["--calibration.data", text_file, "--calibration.n_tokens", "256", "--calibration.sequence_length", "64"]
    command = ["quantize", float_model, str(tmp_path / "out"), "--group_size", "32", *data]
    n_made = 0

    def interrupted(self, work, number):
        nonlocal n_made
        n_made += 1
        if n_made == 2:
            raise KeyboardInterrupt
        return keep(self, work, number)

    keep = PartsOfModel.keep
    monkeypatch.setattr(quantize, "load_model", None)  # the model as a whole is not needed
    monkeypatch.setattr(PartsOfModel, "keep", interrupted)
    assert "interrupted" in refused(capsys, command, 130)
    assert not (tmp_path / "out" / "config.json").exists()
    printed(capsys, command)
    calibration = pql.Calibration(
        data=TEXT, tokenizer=AutoTokenizer.from_pretrained(float_model), n_tokens=256, sequence_length=64
    )
    expected = pql.quantize_model(
        AutoModelForCausalLM.from_pretrained(float_model),
        pql.HQQConfig(group_size=32),
        calibration=calibration,
        progress=False,
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in expected.state_dict().items())
    assert "--overwrite" in refused(capsys, [*command, "--overwrite", "--n_processes", "2"], 2)


def test_a_budget_is_planned_reported_and_kept_as_a_plan_that_files_take(float_model, text_file, tmp_path, capsys):
    data = ["--calibration.data", text_file, "--calibration.n_tokens", "512", "--calibration.sequence_length", "64"]
    command = ["quantize", float_model, str(tmp_path / "a"), "--group_size", "32", *data]
    found = json.loads(printed(capsys, [*command, "--avg_bits", "4", "--choices", "[2, 3, 4]", "--json"]))
    assert found["plan"]["bits_per_weight"] <= 4
    assert found["plan"]["measured_kl"] > 0
    assert found["plan"]["predicted_kl"] > 0
    plan = pql.BitPlan.load(tmp_path / "a" / "bit_plan.json")
    assert plan.measured_kl == found["plan"]["measured_kl"]
    assert {fields["nbits"] for fields in plan.overrides.values()} > {3}
    # The same plan from files to files gives the same model.
    plan_file = str(tmp_path / "a" / "bit_plan.json")
    command[2] = str(tmp_path / "b")
    text = printed(capsys, [*command, "--plan", plan_file])
    assert f"predicted KL {plan.predicted_kl:.4f}" in text
    first, second = (load_file(tmp_path / each / "model.safetensors") for each in ("a", "b"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "b" / "quantlayers_run.json").exists()


def test_a_dry_run_with_a_size_says_that_bits_are_still_to_be_planned(float_model, text_file, tmp_path, capsys):
    arguments = ["quantize", float_model, str(tmp_path / "out"), "--size", "1MB", "--calibration.data", text_file]
    assert "bits are planned" in printed(capsys, [*arguments, "--group_size", "32", "--dry_run"])
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_the_sizes_and_writes_nothing(float_model, quantized, tmp_path, capsys):
    arguments = ["quantize", float_model, str(tmp_path / "out"), "--group-size", "32", "--dry-run", "--json"]
    planned = json.loads(printed(capsys, arguments))
    assert not (tmp_path / "out").exists()
    assert planned["nbytes"] == pql.summary(AutoModelForCausalLM.from_pretrained(quantized)).nbytes


def test_estimate_tells_each_step_before_and_after_quantizing(float_model, quantized, capsys):
    size = ["--batch_size", "2", "--max_length", "16", "--lora.r", "4"]
    found = json.loads(printed(capsys, ["estimate", float_model, "--group_size", "32", *size, "--json"]))
    assert set(found) == {"quantize", "train", "merge"}
    assert all(step["peak_bytes"] == sum(step["memory"].values()) > 0 for step in found.values())
    text = printed(capsys, ["estimate", quantized, *size])
    assert text.startswith("train: ")
    assert "merge: " in text
    assert "must be at least 1" in refused(capsys, ["estimate", quantized, "--batch_size", "0"], 2)


@pytest.mark.parametrize("options", [["--batch_size", "999999999"], ["--batch_size", "2000", "--max_length", "512"]])
def test_an_estimate_of_absurd_batches_is_scaled_from_small_ones(options, quantized, capsys):
    one, many = (
        json.loads(printed(capsys, ["estimate", quantized, *given, "--json"]))["train"]
        for given in (["--batch_size", "200"], options)
    )
    times = int(options[1]) / 200
    kind = "gradients and activations"
    assert many["memory"][kind] == pytest.approx(one["memory"][kind] * times, rel=0.35)
    assert times / 10 < many["seconds"] / one["seconds"] < times * 10


def test_merge_saves_one_model_and_its_report(quantized, adapter, text_file, tmp_path, capsys):
    folder = tmp_path / "merged"
    held_out = ["--evaluate_on", text_file, "--evaluate_tokens", "1024"]
    text = printed(capsys, ["merge", adapter, str(folder), *held_out])
    assert "capture" in text
    report = json.loads((folder / "merge_report.json").read_text())
    assert report["strategy"] == "auto"
    assert len(report["layers"]) == 14
    merged = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(quantized)
    q_proj = "model.layers.0.self_attn.q_proj.W_q"
    assert not torch.equal(merged.state_dict()[q_proj], base.state_dict()[q_proj])


def test_a_merge_under_a_budget_plans_reports_and_keeps_the_plan(quantized, adapter, text_file, tmp_path, capsys):
    data = ["--calibration.data", text_file, "--calibration.n_tokens", "256", "--calibration.sequence_length", "64"]
    command = ["merge", adapter, str(tmp_path / "a"), "--average_bits", "4", "--choices", "[2, 3, 4]", *data]
    assert "bits are planned" in printed(capsys, [*command, "--dry_run"])
    found = json.loads(printed(capsys, [*command, "--json"]))
    plan = pql.BitPlan.load(tmp_path / "a" / "bit_plan.json")
    assert found["plan"]["bits_per_weight"] == plan.bits_per_weight <= 4
    assert found["plan"]["measured_kl"] > 0
    assert found["bits_after"] == pytest.approx(plan.bits_per_weight)
    assert len({round(layer["bits_after"]) for layer in found["layers"]}) > 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    given = ["merge", adapter, str(tmp_path / "b"), "--plan", str(tmp_path / "a" / "bit_plan.json"), "--json"]
    again = json.loads(printed(capsys, given))
    assert [layer["bits_after"] for layer in again["layers"]] == [layer["bits_after"] for layer in found["layers"]]


def test_evaluate_measures_perplexity_and_divergence(float_model, quantized, text_file, capsys, monkeypatch):
    alone = ["evaluate", float_model, "--text", text_file, "--window", "64", "--n_tokens", "1024", "--json"]
    alone = json.loads(printed(capsys, alone))
    arguments = ["evaluate", quantized, "--text", text_file, "--window", "64", "--n_tokens", "1024", "--json"]
    found = json.loads(printed(capsys, [*arguments, "--reference", float_model]))
    assert found["perplexity"] > 1
    assert 0 < found["kl"] < 0.1
    assert 0.5 < found["top1_agreement"] <= 1
    monkeypatch.setattr(evaluate, "perplexity", None)  # both models run once, and each gives its own with the KL
    both = json.loads(printed(capsys, [*arguments, "--reference", float_model]))
    assert both == found
    assert both["reference_perplexity"] == alone["perplexity"]
    same = json.loads(printed(capsys, [*arguments, "--reference", quantized]))
    assert (same["kl"], same["top1_agreement"]) == (0.0, 1.0)


def test_evaluate_shows_answers_beside_those_of_the_reference(float_model, quantized, tmp_path, capsys):
    arguments = ["evaluate", quantized, "--max_new_tokens", "6", "--prompts"]
    rows = (
        ("a.txt", "The lamp\n\nThe chair\n"),
        ("b.jsonl", '{"prompt": "The lamp", "completion": "x"}\n{"prompt": "The chair", "completion": "y"}\n'),
        ("c.jsonl", '{"instruction": "The lamp", "output": "x"}\n{"instruction": "The chair", "output": "y"}\n'),
    )
    inline = json.loads(printed(capsys, [*arguments, '["The lamp", "The chair"]', "--json"]))["answers"]
    assert [row["prompt"] for row in inline] == ["The lamp", "The chair"]
    for name, content in rows:
        (tmp_path / name).write_text(content)
        assert json.loads(printed(capsys, [*arguments, str(tmp_path / name), "--json"]))["answers"] == inline
    limited = json.loads(printed(capsys, [*arguments, str(tmp_path / "a.txt"), "--limit", "1", "--json"]))
    assert limited["answers"] == inline[:1]
    compared = [*arguments, "The lamp", "--reference", float_model, "--temperature", "1.0"]
    (first,), (second,), (other,), (same,) = (
        json.loads(printed(capsys, [*command, "--json"]))["answers"]
        for command in (
            compared,
            compared,
            [*compared, "--seed", "1"],
            [*arguments, "The lamp", "--reference", quantized, "--temperature", "1.0"],
        )
    )
    assert first == second
    assert first["reference_answer"] != first["answer"] != other["answer"]
    assert same["reference_answer"] == same["answer"] == first["answer"]  # drawn alike
    text = printed(capsys, [*arguments, "The lamp", "--reference", float_model])
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:4]] == ["prompt", "answer", "reference"]


def test_a_chat_is_asked_up_to_its_last_answer(tmp_path):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    forms = [{name: chat} for name in ("messages", "conversations", "prompt") for chat in (said, turns)]
    for row in (*forms, {"prompt": said[:1], "completion": said[1:]}):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        assert prompts_of("prompts", str(tmp_path / "rows.jsonl"), limit=None) == [said[:1]], row


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["nope.txt"], "there is no such file"),
        (["[]"], "holds none"),
        (['["x", ""]'], "holds an empty one"),
        (["[null]"], "--prompts [null]: entry 1 is null, and no text"),
        (['["x", [1]]'], "entry 2 is [1], and no text"),
        (["x", "--temperature", "-1"], "--temperature -1.0 must be at least 0"),
        (["x", "--seed", "-1"], "--seed -1 must be at least 0, and at most 4294967295"),
        (["x", "--max_new_tokens", "0"], "--max_new_tokens 0 must be at least 1"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(options, said, quantized, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", None)
    assert said in refused(
        capsys, ["evaluate", quantized, "--prompts", *options], 1 if options[0] == "nope.txt" else 2
    )


def test_inspect_tells_bits_adapters_and_damage(quantized, adapter, tmp_path, capsys):
    text = printed(capsys, ["inspect", quantized])
    assert "hqq nbits=4" in text
    assert "every tensor is as it was saved" in text
    assert "rank" in text or "r: 4" in printed(capsys, ["inspect", adapter])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in Path(quantized).iterdir():
        content = bytearray(file.read_bytes())
        if file.suffix == ".safetensors":
            content[-5] ^= 1
        (damaged / file.name).write_bytes(content)
    assert "1 tensors are damaged" in printed(capsys, ["inspect", str(damaged)], exit_code=1)


def test_chat_answers_with_and_without_the_adapter(quantized, adapter, capsys):
    arguments = ["chat", quantized, "--adapter", adapter, "--prompt", "The lamp", "--max_new_tokens", "8"]
    found = json.loads(printed(capsys, [*arguments, "--compare", "--json"]))
    (ours,), (theirs,) = (
        [each for each in found[name] if each["role"] == "assistant"] for name in ("messages", "without_adapter")
    )
    assert ours["content"] != theirs["content"]


def test_export_writes_what_an_engine_reads(quantized, tmp_path, capsys):
    folder = tmp_path / "mlx"
    text = printed(capsys, ["export", quantized, str(folder), "--format", "mlx"])
    assert "mlx_lm" in text
    assert json.loads((folder / "config.json").read_text())["quantization"]["bits"] == 4
    assert "ggml" in refused(capsys, ["export", quantized, str(tmp_path / "x"), "--format", "ggml"], 2)
    assert not (tmp_path / "x").exists()


def test_the_settings_of_a_page_lie_beside_it_and_make_it_again(quantized, float_model, tmp_path, capsys):
    page = tmp_path / "own.html"
    printed(capsys, ["report", quantized, str(page), "--float_model", float_model, "--n_worst", "1"])
    saved = yaml.safe_load((tmp_path / "own.yaml").read_text())
    assert (saved["folder"], saved["float_model"], saved["n_worst"]) == (quantized, float_model, 1)
    first = page.read_text()
    page.unlink()
    printed(capsys, ["report", str(tmp_path / "own.yaml")])
    assert page.read_text() == first
    (tmp_path / "other.yaml").write_text("mine: true\n")
    said = refused(capsys, ["report", quantized, str(tmp_path / "other.html")], 1)
    assert "other.yaml, which is another file" in said
    assert (tmp_path / "other.yaml").read_text() == "mine: true\n"


# ---- what is wrong


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantise"], "quantise: there is no such verb (did you mean 'quantize'?)"),
        (["quantize", "m", "o", "--nbit", "3"], "there is no option --nbit (did you mean '--nbits'?)"),
        (["quantize", "m", "o", "--nbits", "three"], "nbits='three': expected int"),
        (["quantize", "m"], "output must be given"),
        (["quantize", "m", "o", "p"], "'p' is one argument too many"),
        (["quantize", "no.yaml"], "no.yaml cannot be read"),
        (["merge", "a"], "output must be given"),
        (["merge", "a", "o", "--strategy", "requantise"], "requantise"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, said, capsys):
    assert said in refused(capsys, arguments, 2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: m\nnbit: 3\n", "unknown key 'nbit' (did you mean 'nbits'?)"),
        (
            "model: m\ncalibration:\n  n_token: 3\n",
            "unknown key 'calibration.n_token' (did you mean 'calibration.n_tokens'?)",
        ),
        ("- a\n", "must hold options"),
        ("a: [\n", "is no YAML"),
    ],
)
def test_a_wrong_file_is_one_line(content, said, tmp_path, capsys):
    file = tmp_path / "q.yaml"
    file.write_text(content)
    assert said in refused(capsys, ["quantize", str(file), "--output", str(tmp_path / "out")], 2)
    assert not (tmp_path / "out").exists()


def test_names_of_other_trainers_mean_the_same(float_model, tmp_path, capsys):
    file = tmp_path / "q.yaml"
    file.write_text(f"model_name_or_path: {float_model}\nbits: 3\ngroup_size: 32\n")
    found = printed(capsys, ["quantize", str(file), "--output_dir", str(tmp_path / "out"), "--dry_run"])
    assert "nbits=3" in found


def test_what_fails_is_one_line_and_writes_nothing(float_model, quantized, adapter, text_file, tmp_path, capsys):
    out, other, empty = (str(tmp_path / name) for name in ("out", "other", "empty.jsonl"))
    printed(capsys, ["quantize", float_model, other, "--group_size", "16"])
    Path(empty).touch()
    held_out = ["--text", text_file, "--n_tokens", "64", "--window", "32"]
    cases = [
        (["merge", adapter, out, "--model", other], "was trained on the quantized base"),
        (["chat", other, "--adapter", adapter, "--prompt", "x"], "was trained on the quantized base"),
        (["evaluate", other, "--adapter", adapter, *held_out], "was trained on the quantized base"),
        (["merge", quantized, out], "Give the folder of an adapter"),
        (["merge", "no-such-adapter", out], "Give the folder of an adapter"),
        (["evaluate", quantized, "--adapter", other, *held_out], "Give the folder of an adapter"),
        (["chat", adapter, "--adapter", adapter, "--tokenizer", quantized], "holds an adapter, and a model is needed"),
        (["estimate", adapter], "holds an adapter, and a model is needed here"),
        (["report", "no-such-folder"], "--folder no-such-folder: there is no such folder"),
        (["report", empty], "empty.jsonl is a file. Name the folder of a model"),
        (["chat", "no-such-model"], "there is no such folder here, and the Hub has"),
        (["train", "no-such-model", out, "--data", text_file], "there is no such folder here, and the Hub has"),
        (["train", quantized, out, "--data", empty], "empty.jsonl is empty"),
        (["quantize", "./no/such/folder", out], "there is no such folder"),
        (["quantize", float_model, quantized, "--dtype", "float32"], "is not empty. Choose another folder"),
        (["quantize", float_model, quantized], quantized),
        (["quantize", float_model, out, "--calibration.data", "no.txt"], "there is no such file"),
        (["quantize", float_model, out, "--plan", "no.json"], "no.json"),
        (["merge", adapter, out, "--model", float_model, "--strategy", "exact"], ""),
        (["merge", float_model, out], ""),
        (["evaluate", quantized, "--text", "no.txt"], "there is no such file"),
    ]
    for arguments, said in cases:
        assert said in refused(capsys, arguments, 1), arguments
    assert not Path(out).exists()


def test_an_interrupt_is_said_and_leaves_nothing(float_model, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_quantlayers.cli.verbs.quantize.quantize_checkpoint", interrupted)
    assert "interrupted" in refused(
        capsys, ["quantize", float_model, str(tmp_path / "out"), "--group_size", "32"], 130
    )
    assert not (tmp_path / "out").exists()


def test_resume_false_starts_from_scratch_and_removes_no_finished_model(float_model, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"

    def interrupted(self, work, number):
        if number == at:
            raise KeyboardInterrupt
        make(self, work, number)

    make = PartsOfModel.make
    command = ["quantize", float_model, str(out)]
    monkeypatch.setattr(quantize_files, "PART_BYTES", 2**14)
    for at in (0, 2):
        with monkeypatch.context() as patched:
            patched.setattr(PartsOfModel, "make", interrupted)
            said = refused(capsys, [*command, "--group_size", "16"], 130)
        assert out.exists() == (at > 0)  # nothing was finished, so nothing is kept
        assert (f"is kept in {out / '.quantizing'}: the same command goes on" in said) == (at > 0)
    said = refused(capsys, [*command, "--group_size", "32"], 1)
    assert "unfinished run with other values of config" in said
    assert "--resume false" in said
    printed(capsys, [*command, "--group_size", "32", "--resume", "false"])
    assert [file.name for file in out.iterdir() if file.name.startswith(".")] == []
    before = (out / "model.safetensors").stat().st_mtime_ns
    for options in (["--resume", "false"], []):
        printed(capsys, [*command, "--group_size", "32", *options])  # it is finished: nothing is done
    assert "holds another model" in refused(capsys, [*command, "--group_size", "16", "--resume", "false"], 1)
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    other = [*command[:2], str(tmp_path / "other"), "--resume", "false", "--dtype", "float32"]
    assert "--resume false is for what goes from files to files" in refused(capsys, other, 2)
    assert not (tmp_path / "other").exists()


def test_a_finished_folder_that_is_quantized_again_was_there_already(float_model, tmp_path, capsys):
    command = ["quantize", float_model, str(tmp_path / "out"), "--group_size", "32"]
    assert "saved in" in printed(capsys, command)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    assert "was there already, complete" in printed(capsys, command)
    assert json.loads(printed(capsys, [*command, "--json"]))["was_there"] is True
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")} == before


def test_an_adapter_of_another_architecture_names_both_and_the_way_out(quantized, adapter, tmp_path, capsys):
    config = GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(quantized).save_pretrained(tmp_path / "gpt2")
    command = ["chat", str(tmp_path / "gpt2"), "--adapter", adapter, "--prompt", "x"]
    said = refused(capsys, command, 1)
    assert "gpt2 (GPT2LMHeadModel): it was trained on" in said
    assert "(LlamaForCausalLM). Give its own base, or an adapter of this model." in said
    assert len(said) < 600


def test_a_file_of_options_is_parsed_once(float_model, tmp_path, capsys, monkeypatch):
    (tmp_path / "q.yaml").write_text(yaml.safe_dump({"model": float_model, "group_size": 32, "output": "unused"}))
    parsed = []

    class Counted(option_names._EachKeyOnce):
        def __init__(self, stream):
            parsed.append(stream)
            super().__init__(stream)

    monkeypatch.setattr(option_names, "_EachKeyOnce", Counted)
    option_names._parsed.cache_clear()
    printed(capsys, ["quantize", str(tmp_path / "q.yaml"), "--output", str(tmp_path / "out"), "--dry_run"])
    assert parsed == [(tmp_path / "q.yaml").read_text()]


def test_what_a_merge_advises_is_written_with_options(adapter, tmp_path, capsys, monkeypatch):
    """All that there is to advise, in the report of a merge that lost little."""
    layers = [
        SimpleNamespace(is_merge_aware=False, can_be_qalora=False, strategies=tuple(STRATEGIES), strategy="requantize")
    ]
    told = advice.not_measured(layers, is_captured=False, noise=10.0)
    adviced = f"{'; or '.join(advice._other_ways(layers).values())}; {told}; report.table() has all of them"
    monkeypatch.setattr(MergeReport, "__str__", lambda report: adviced)
    said = printed(capsys, ["merge", adapter, str(tmp_path / "merged"), "--strategy", "requantize"])
    assert "--strategy calibrated --calibration.data FILE" in said
    assert "train --merge_aware true and merge with --strategy aware" in said
    assert "--evaluate_on FILE" in said
    assert not any(python in said for python in ('strategy="', "peft_quantlayers.", "evaluate_on=", "report.table()"))


def test_evaluate_reads_the_rows_that_train_takes(quantized, tmp_path, capsys):
    found = []
    rows = (
        {"text": "ab cd"},
        {"prompt": "ab", "completion": " cd"},
        {"instruction": "ab", "input": "", "output": "cd"},
    )
    for number, row in enumerate(rows):
        file = tmp_path / f"{number}.jsonl"
        file.write_text("\n".join([json.dumps(row)] * 40))
        found.append(
            json.loads(printed(capsys, ["evaluate", quantized, "--text", str(file), "--window", "64", "--json"]))
        )
    assert found[0]["perplexity"] == found[1]["perplexity"]
    assert found[2]["n_tokens"] > found[0]["n_tokens"]  # an empty line between question and answer


# What is Python, in what a command line says: arguments, names of the package, strategies in quotes.
PYTHON = re.compile(r"\b[a-z_]+=[\"'\w(\[]|peft_quantlayers\.|\w+\(\)|for_export|\"\w+\"|\boverwrite=True")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["merge", "ADAPTER", "OUT", "--strategy", "aware"], "Train with --merge_aware true, or merge with another"),
        (["merge", "ADAPTER", "OUT", "--strategy", "exact"], "or use --strategy requantize or --strategy keep."),
        (["merge", "ADAPTER", "OUT", "--strategy", "append"], "Use --strategy calibrated or --strategy requantize;"),
        (["merge", "ADAPTER", "OUT", "--strategy", "calibrated"], "use --strategy requantize, or --strategy keep"),
        (["merge", "ADAPTER", "OUT", "--calibration.data", "TEXT"], "--strategy calibrated and --strategy append do"),
        (["export", "FLOAT", "OUT", "--format", "mlx"], "(quantize MODEL OUTPUT), or give --format dense"),
        (["export", "MODEL", "OUT", "--format", "awq"], "quantize --integer_zero true --export_target awq"),
        (["export", "MODEL", "OUT", "--format", "aqlm"], "--format dense (for all)"),
    ],
)
def test_what_is_refused_is_said_in_options(
    command, said, adapter, quantized, float_model, text_file, tmp_path, capsys
):
    places = {
        "TEXT": text_file,
        "ADAPTER": adapter,
        "MODEL": quantized,
        "FLOAT": float_model,
        "OUT": str(tmp_path / "out"),
    }
    given = [places.get(word, word) for word in command]
    found = refused(capsys, given, 2 if given[-1] == "calibrated" or "--calibration.data" in given else 1)
    assert said in found
    assert not PYTHON.search(found), PYTHON.search(found)


def test_the_options_that_a_refused_export_names_make_a_model_that_it_takes(float_model, quantized, tmp_path, capsys):
    refusal = refused(capsys, ["export", quantized, str(tmp_path / "x"), "--format", "awq"], 1)
    options = re.search(r"of the format: quantize (--.*)\.$", refusal)[1].split()
    printed(capsys, ["quantize", float_model, str(tmp_path / "q"), *options])
    printed(capsys, ["export", str(tmp_path / "q"), str(tmp_path / "x"), "--format", "awq"])


@pytest.mark.parametrize(("model", "said"), [("other", "has the shape"), ("quantized", "is quantized itself")])
def test_a_float_model_of_another_shape_is_refused_before_an_export(model, said, quantized, tmp_path, capsys):
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    given = str(tmp_path / "other") if model == "other" else quantized
    command = ["export", quantized, str(tmp_path / "x"), "--format", "gptq", "--approximate", "requantize"]
    assert said in refused(capsys, [*command, "--float_model", given], 1)
    assert not (tmp_path / "x").exists()
