"""``train``: SFT and DPO on a tiny model, in this process."""

import json
import re
from pathlib import Path

import pytest
import yaml
from commands import TEXT, printed, refused
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_quantlayers as pql
from peft_quantlayers.cli import main
from peft_quantlayers.cli.read_data import token_ids


def test_train_then_merge_in_one_run(float_model, tmp_path, capsys):
    rows = [{"prompt": "The lamp is", "completion": " red."}, {"prompt": "The chair is", "completion": " blue."}] * 8
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model": float_model,
        "data": str(data),
        "quantization": {"method": "hqq", "nbits": 3, "group_size": 32},
        "lora": {"r": 4, "lora_alpha": 8},
        "training": {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
        "merge": "requantize",
    }
    file, folder = tmp_path / "train.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(settings))
    shown = printed(capsys, ["train", str(file), "--output", str(folder), "--show-batch"])
    assert "[ red." in shown or "[ blue." in shown
    assert not (folder / "adapter_config.json").exists()
    text = printed(capsys, ["train", str(file), "--output", str(folder)])
    assert re.search(r"trained 3 steps, loss [\d.]+, \d+ tokens/s, at most [\d.]+ [GM]iB of memory;", text)
    assert (folder / "adapter_model.safetensors").exists()
    assert pql.quantized_modules(AutoModelForCausalLM.from_pretrained(folder / "merged"))
    assert "is not empty" in refused(capsys, ["train", str(file), "--output", str(folder)], 1)
    # What a merge advises is in options, and all layers are in a file, as merge writes it.
    assert "merge_report.json has all of them" in text
    assert f"such options are those of peft-quantlayers merge {folder} MERGED" in text
    assert not any(python in text for python in ('strategy="', "peft_quantlayers.", "evaluate_on=", "report.table()"))
    assert (folder / "merged" / "merge_report.json").is_file()
    # The base can be made again from what lies beside it.
    again = tmp_path / "again"
    printed(capsys, ["quantize", str(folder / "base" / "quantize.yaml"), "--output", str(again)])
    assert (again / "model.safetensors").read_bytes() == (folder / "base" / "model.safetensors").read_bytes()


def test_what_peft_says_of_options_that_nobody_gave_is_not_shown(quantized, tmp_path, recwarn):
    command = with_settings(tmp_path, [{"text": TEXT}], model=quantized, training={"max_steps": 1})
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    assert not [each for each in recwarn if "loftq_config" in str(each.message)]


def test_a_folder_for_the_merged_model_that_is_in_use_is_refused_before_training(quantized, tmp_path, capsys):
    command = with_settings(tmp_path, [{"text": TEXT}], model=quantized, merge="auto", merged_output=str(tmp_path))
    said = refused(capsys, [*command, "--output", str(tmp_path / "out")], 1)
    assert f"--merged_output {tmp_path} is not empty. Choose another folder" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("adapter_type", ["lora", "scales"])
def test_the_settings_beside_an_output_train_the_same_again(adapter_type, quantized, tmp_path, capsys):
    first, again = tmp_path / "first", tmp_path / "again"
    settings = {"model": quantized, "adapter_type": adapter_type, "training": {"max_steps": 1}}
    settings |= {"lora": {}} if adapter_type == "scales" else {}
    command = with_settings(tmp_path, [{"text": TEXT}] * 4, **settings)
    printed(capsys, [*command, "--output", str(first)])
    printed(capsys, ["train", str(first / "train.yaml"), "--output", str(again)])
    assert (again / "adapter_model.safetensors").read_bytes() == (first / "adapter_model.safetensors").read_bytes()


def test_a_training_that_diverged_is_no_result(quantized, tmp_path, capsys):
    command = with_settings(
        tmp_path,
        [{"text": TEXT}] * 4,
        model=quantized,
        training={"max_steps": 3, "learning_rate": 1e30, "max_grad_norm": 0.0, "save_strategy": "no"},
    )
    said = refused(capsys, [*command, "--output", str(tmp_path / "out")], 1)
    assert re.search(r"diverged: .*lora_.* holds NaN or Inf after 3 steps.*--training.learning_rate", said)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


PAIRS = [
    {"prompt": "The lamp is", "chosen": " red.", "rejected": " a fish."},
    {"prompt": "The chair is", "chosen": " blue.", "rejected": " a bird of prey."},
] * 4


def with_settings(tmp_path, rows, **settings) -> list[str]:
    """The start of a command that trains on ``rows``, by a file of settings."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    adapter = {"lora": {"r": 4, "lora_alpha": 8}} if settings.get("adapter_type", "lora") == "lora" else {}
    settings = {"data": str(tmp_path / "rows.jsonl"), **adapter, **settings}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    return ["train", str(tmp_path / "train.yaml")]


def test_packed_rows_are_learned_with_an_optimizer_of_eight_bits(quantized, tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="the extra `bitsandbytes` is not installed")
    rows = [{"prompt": f"The lamp {number} is", "completion": " red."} for number in range(64)]
    training = {"max_steps": 6, "packing": True, "max_length": 128, "optim": "adamw_8bit", "learning_rate": 1e-2}
    training |= {"per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"}
    command = with_settings(tmp_path, rows, model=quantized, output=str(tmp_path / "out"), training=training)
    found = json.loads(printed(capsys, [*command, "--json"]))
    losses = [each["loss"] for each in found["log"] if "loss" in each]
    assert losses[-1] < 0.9 * losses[0]
    n_tokens = [each["num_tokens"] for each in found["log"] if "num_tokens" in each]
    assert n_tokens[0] > 2 * 100  # two full windows, of rows of 20 tokens


@pytest.mark.parametrize("adapter_type", ["lora", "merge_aware", "scales"])
def test_dpo_learns_to_prefer_what_was_chosen(adapter_type, quantized, tmp_path, capsys):
    folder = tmp_path / "out"
    command = with_settings(
        tmp_path,
        PAIRS,
        model=quantized,
        trainer="dpo",
        adapter_type="scales" if adapter_type == "scales" else "lora",
        merge_aware=adapter_type == "merge_aware",
        training={"max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "logging_steps": 1},
        merge="auto",
    )
    shown = printed(capsys, [*command, "--output", str(folder), "--show-batch"])
    assert "[ red." in shown
    assert "[ a fish." in shown
    printed(capsys, [*command, "--output", str(folder), "--training.report_to", "none"])
    log = [each for each in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in each]
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # the adapter changes nothing yet: log 2
    assert log[-1]["loss"] < 0.6
    assert log[-1]["rewards/accuracies"] == 1.0
    assert log[-1]["rewards/margins"] > 0.1
    # The reference is the model without the adapter: no second adapter is made, saved or merged.
    assert [path.name for path in folder.rglob("adapter_config.json") if "checkpoint" not in str(path)] == [
        "adapter_config.json"
    ]
    assert pql.quantized_modules(AutoModelForCausalLM.from_pretrained(folder / "merged"))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"instruction": "Which?", "input": "lamp", "chosen": "red", "rejected": "fish"}], "[red"),
        (
            [
                {
                    "chosen": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "red"}],
                    "rejected": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "fish"}],
                }
            ],
            "[red",
        ),
    ],
    ids=["instruction", "messages"],
)
def test_dpo_reads_preferences_in_the_forms_that_people_have(rows, expected, quantized, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(quantized)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = with_settings(tmp_path, rows * 8, model=quantized, trainer="dpo", tokenizer=str(tmp_path / "tokenizer"))
    shown = printed(capsys, [*command, "--output", str(tmp_path / "out"), "--show-batch"])
    assert expected in shown


def folder_with_template(tmp_path: Path, model: str, template: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


SAID = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "red"}]
TURNS = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "red"}]


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": TURNS}],
        [{"conversations": SAID}],
        [{"messages": SAID}, {"messages": TURNS}],
        [{"prompt": TURNS[:1], "completion": TURNS[1:]}],
    ],
    ids=["messages", "conversations", "mixed", "prompt and completion"],
)
def test_turns_with_from_and_value_are_read_under_every_name(rows, quantized, tmp_path, capsys):
    tokenizer = folder_with_template(
        tmp_path, quantized, "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    command = with_settings(tmp_path, rows * 8, model=quantized, tokenizer=tokenizer)
    shown = printed(capsys, [*command, "--output", str(tmp_path / "out"), "--show-batch"]).replace("[", "")
    assert "<user>Which?<assistant>red" in shown
    reader = AutoTokenizer.from_pretrained(tokenizer)
    ids = token_ids("text", str(tmp_path / "rows.jsonl"), reader, n_tokens=52)
    assert reader.decode(ids) == "<user>Which?<assistant>red" * 2


@pytest.mark.parametrize(
    ("template", "reason"), [("{% for m in %}", "Expected an expression"), ("{{ raise_exception('no') }}", "no")]
)
@pytest.mark.parametrize("option", ["--dry_run", "--show_batch", "--training.max_steps=1"])
def test_a_chat_template_that_fails_is_named(template, reason, option, quantized, float_model, tmp_path, capsys):
    tokenizer, out = folder_with_template(tmp_path, quantized, template), str(tmp_path / "out")
    command = with_settings(tmp_path, [{"messages": SAID}] * 8, model=quantized, tokenizer=tokenizer)
    said = refused(capsys, [*command, "--output", out, option], 1)
    assert f"the chat template of {tokenizer} does not take these messages: {reason}" in said
    assert "unexpected" not in said
    for verb in (["evaluate", quantized, "--text"], ["quantize", float_model, out, "--calibration.data"]):
        said = refused(capsys, [*verb, str(tmp_path / "rows.jsonl"), "--tokenizer", tokenizer], 1)
        assert f"the chat template of {tokenizer} does not take these messages: {reason}" in said


def test_rows_of_the_other_trainer_are_refused_with_what_is_taken(quantized, tmp_path, capsys):
    for trainer, rows, said in (
        ("dpo", [{"text": "x"}], "--trainer dpo takes rows with prompt (or instruction), chosen and rejected"),
        ("sft", PAIRS, "--trainer sft takes rows with text"),
        ("sft", [{"prompt": "x"}], "--trainer sft takes rows with text"),
    ):
        command = with_settings(tmp_path, rows, model=quantized, trainer=trainer)
        assert said in refused(capsys, [*command, "--output", str(tmp_path / "out")], 1)
    assert not (tmp_path / "out").exists()


def test_tensorboard_shows_where_the_adapter_learns(quantized, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra `report` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training = {"max_steps": 2, "save_steps": 1, "logging_steps": 1, "report_to": "tensorboard"}
    command = with_settings(tmp_path, [{"text": TEXT}] * 4, model=quantized, training=training)
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Images("adapter/norm")] == [1, 2]
    assert [event.step for event in events.Images("adapter/delta over step")] == [1, 2]
    assert [event.step for event in events.Images("base/scale")] == [0]  # the base does not change
    assert [event.step for event in events.Images("base/zero")] == [0]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    scaling = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    found = []
    for name, layer in pql.quantized_modules(AutoModelForCausalLM.from_pretrained(quantized)).items():
        a, b = (tensors[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
        delta = b @ a * scaling["lora_alpha"] / scaling["r"]
        found.append(float(delta.pow(2).mean().sqrt() / layer.quantized_weight.tensors["scale"].double().median()))
    drawn = events.Scalars("adapter/delta over step, mean")[-1].value
    assert drawn == pytest.approx(sum(found) / len(found), rel=1e-3)


@pytest.mark.parametrize(
    "verb", ["quantize", "train", "merge", "export", "evaluate", "inspect", "estimate", "report", "chat"]
)
def test_json_is_all_that_is_printed(verb, commands, capfd):
    """Also by the packages below: transformers prints the metrics of a training."""
    assert main([*commands[verb], "--json"]) == 0
    assert json.loads(capfd.readouterr().out)
