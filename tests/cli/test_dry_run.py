"""``--dry_run``: what would be done and what it takes, by every verb that costs anything; it writes nothing."""

import json
import re
from pathlib import Path

import pytest
from commands import printed, refused
from test_exit_codes import WITH_OPTIONS
from test_wrong_places import contents
from transformers import PreTrainedModel

from quantlayers_cli import options

# What is asked for is a dry run itself.
WITHOUT = {"estimate"}
# These have weights to plan on, and read a quantized model to see its layers.
LOADING = {"train", "merge"}
SAID = {
    "quantize": "would hold",
    "train": "would train",
    "merge": "would be merged into",
    "export": "would write",
    "evaluate": "would measure",
    "inspect": "would read",
    "report": "would write",
    "chat": "would talk with",
}


def test_every_verb_that_costs_anything_has_it():
    listed = {verb: set(map(options.option_name, options._verbs()[verb]["options"])) for verb in WITH_OPTIONS}
    assert {verb for verb in WITH_OPTIONS if "dry_run" not in listed[verb]} == WITHOUT


@pytest.mark.parametrize("spelled", ["--dry_run", "--dry-run"])
@pytest.mark.parametrize("verb", SAID)
def test_it_says_what_would_be_done_and_what_it_takes_and_does_nothing(
    verb, spelled, commands, quantized, tmp_path, capsys, monkeypatch
):
    if verb not in LOADING:
        monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    before = contents(tmp_path), contents(Path(quantized))
    text = printed(capsys, [*commands[verb], spelled])
    assert SAID[verb] in text
    assert re.search(r"iB of memory \(.*libraries .*iB", text)
    assert json.loads(printed(capsys, [*commands[verb], spelled, "--json"]))
    assert (contents(tmp_path), contents(Path(quantized))) == before


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["evaluate", "MODEL", "--text", "no.txt"], "there is no such file"),
        (["evaluate", "MODEL", "--text", "TEXT", "--adapter", "FLOAT"], "Give the folder of an adapter"),
        (["chat", "MODEL", "--adapter", "FLOAT"], "Give the folder of an adapter"),
        (["report", "FLOAT"], "holds no quantized layer"),
        (["report", "MODEL", "--text", "no.txt"], "there is no such file"),
        (["inspect", "EMPTY"], "holds no model"),
        (["report", "EMPTY"], "there is nothing to report on"),
        (["export", "MODEL", "OUT", "--format", "awq"], "awq cannot hold this model"),
        (["export", "MODEL", "OUT", "--format", "mlx", "--adapter", "EMPTY"], "adapter_config.json"),
    ],
)
def test_what_would_fail_at_once_is_refused(command, said, quantized, float_model, text_file, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = {"MODEL": quantized, "FLOAT": float_model, "TEXT": text_file, "OUT": str(tmp_path / "out")}
    places["EMPTY"] = str(tmp_path / "empty")
    assert said in refused(capsys, [*(places.get(word, word) for word in command), "--dry_run"], 1)


def test_the_weights_of_all_models_are_counted(quantized, float_model, text_file, capsys):
    command = ["evaluate", quantized, "--text", text_file, "--reference", float_model, "--dry_run", "--json"]
    found = json.loads(printed(capsys, command))
    for what, model in ((quantized, quantized), (f"{float_model}, beside it", float_model)):
        assert found["memory"][what] == (Path(model) / "model.safetensors").stat().st_size
    assert found["seconds"] > 0


def test_a_base_beside_its_adapter_is_counted_twice(adapter, quantized, text_file, capsys):
    command = ["evaluate", adapter, "--text", text_file, "--reference", quantized, "--dry_run", "--json"]
    found = json.loads(printed(capsys, command))
    assert found["memory"][quantized] == found["memory"][f"{quantized}, beside it"] > 0


def test_an_export_takes_the_disk_that_is_said(quantized, commands, tmp_path, capsys):
    said = json.loads(printed(capsys, [*commands["export"], "--dry_run", "--json"]))
    printed(capsys, commands["export"])
    written = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert written <= said["disk_bytes"] <= 6 * written


def test_the_plan_of_a_training_counts_the_rows_that_will_be_read(commands, capsys):
    command = [*commands["train"], "--dry_run", "--json", "--training.max_steps"]
    found = {
        name: json.loads(printed(capsys, [*command, *options]))
        for name, options in {
            "as they are": ["3"],
            "packed": ["3", "--training.packing", "true", "--training.max_length", "512"],
            "two epochs": ["-1", "--training.num_train_epochs", "2", "--training.per_device_train_batch_size", "1"],
        }.items()
    }
    assert found["as they are"]["longest_row"] < found["packed"]["longest_row"] <= 512
    assert found["as they are"]["peak_bytes"] < found["packed"]["peak_bytes"]
    assert found["as they are"]["n_steps"] == 3
    assert found["two epochs"]["n_steps"] == 2 * found["two epochs"]["rows"]
    assert found["as they are"]["seconds"] > 0
