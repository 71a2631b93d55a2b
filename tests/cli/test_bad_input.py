"""What is wrong with a command is one clear line and an exit code that is not 0; nothing is lost or half written.

What only one verb has stands in ``test_verbs.py`` and ``test_train.py``, kills in ``test_train_killed.py`` and in
``tests/streaming``.
"""

import errno
import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from commands import printed, refused
from transformers import TrainerState

from peft_quantlayers.cli import main, saved_settings, work
from peft_quantlayers.exports import export_formats
from peft_quantlayers.merging import MergeReport
from peft_quantlayers.storage import staging
from quantlayers_cli.main import VERBS, WITHOUT_OPTIONS

WITH_OPTIONS = sorted(VERBS.keys() - set(WITHOUT_OPTIONS))


def copied(source: str, destination: Path, *, without: str) -> str:
    shutil.copytree(source, destination)
    for file in destination.glob(without):
        file.unlink()
    return str(destination)


# ---- names and values


@pytest.mark.parametrize("verb", WITH_OPTIONS)
def test_an_unknown_key_or_a_missing_file_of_options(verb, commands, tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text("no_such: 1\n")
    command = commands[verb]
    for arguments, said in (
        ([*command, "--no_such", "1"], "there is no option --no_such"),
        ([*command, "--config", str(tmp_path / "wrong.yaml")], "wrong.yaml: unknown key 'no_such'"),
        ([*command, "--config", str(tmp_path / "missing.yaml")], "missing.yaml cannot be read"),
    ):
        assert said in refused(capsys, arguments, 2)
    assert not (tmp_path / "out").exists()


WRONG_TYPES = {
    "quantize": ("--nbits", "int"),
    "train": ("--lora.r", "int"),
    "merge": ("--evaluate_tokens", "int"),
    "export": ("--n_tokens", "int"),
    "evaluate": ("--window", "int"),
    "estimate": ("--batch_size", "int"),
    "report": ("--n_worst", "int"),
    "chat": ("--temperature", "float"),
}


@pytest.mark.parametrize("verb", WRONG_TYPES)
def test_a_value_of_a_wrong_type(verb, commands, tmp_path, capsys):
    option, expected = WRONG_TYPES[verb]
    said = refused(capsys, [*commands[verb], option, "many"], 2)
    assert f"{option[2:]}='many': expected {expected}" in said
    assert not (tmp_path / "out").exists()


def test_values_that_are_no_numbers_of_anything(commands, text_file, tmp_path, capsys):
    for verb, options, said in (
        ("evaluate", ["--n_tokens", "-5"], "--n_tokens -5 must be at least 1"),
        ("evaluate", ["--window", "0"], "--window 0 must be at least 2"),
        ("merge", ["--evaluate_on", text_file, "--evaluate_tokens", "0"], "--evaluate_tokens 0 must be at least 2"),
        ("estimate", ["--calibration_tokens", "-3"], "--calibration_tokens -3 must be at least 0"),
        ("report", ["--text", text_file, "--window", "0"], "--window 0 must be at least 2"),
        ("report", ["--n_worst", "-1"], "--n_worst -1 must be at least 0"),
        ("train", ["--lora.r", "0"], "--lora.r 0 must be at least 1"),
        ("train", ["--trainer", "ppo"], "ppo"),
        ("train", ["--device", "no_device"], "device='no_device' cannot be used here"),
        ("merge", ["--device", "no_device"], "device='no_device' cannot be used here"),
    ):
        assert said in refused(capsys, [*commands[verb], *options], 2), (verb, options)
    assert not (tmp_path / "out" / "config.json").exists()


# ---- models, adapters and texts


@pytest.mark.parametrize("verb", ["quantize", "train", "export", "evaluate", "inspect", "estimate", "chat"])
def test_a_model_that_is_not_there_or_damaged(verb, commands, quantized, tmp_path, capsys):
    damaged = Path(copied(quantized, tmp_path / "damaged", without="none"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2000])
    unread = Path(copied(quantized, tmp_path / "unread", without="none"))
    (unread / "config.json").write_text("{ no json")
    (tmp_path / "empty").mkdir()
    for model, said in (
        ("/no/such/folder", "there is no such folder"),
        (str(tmp_path / "empty"), "no config.json in it"),
        (str(unread), "config.json' is not a valid JSON file"),
        (str(damaged), "quantized already" if verb == "quantize" else "model.safetensors is damaged or incomplete"),
    ):
        command = [verb, model, *commands[verb][2:]]
        if verb == "inspect" and model == str(damaged):  # the answer, not an error
            assert "damaged" in printed(capsys, command, exit_code=1)
            continue
        found = refused(capsys, command, 1)
        assert said in found or (verb == "export" and "no config.json" in found), model
    assert not (tmp_path / "out").exists()


EXPORTED_FROM = ["quantize", "train", "export", "evaluate", "reference", "inspect", "estimate", "report", "chat"]


@pytest.mark.parametrize("verb", EXPORTED_FROM)
def test_an_export_for_another_engine_is_named(verb, commands, quantized, float_model, tmp_path, capsys):
    approximate = {"compressed-tensors": "8bit", "gptq": "8bit", "awq": "adapter"}
    for name in ("mlx", "humming", *approximate):
        options = ["--approximate", approximate[name]] if name in approximate else []
        printed(capsys, ["export", quantized, str(tmp_path / name), "--format", name, *options])
    for name in ("onnx", "openvino", "gguf"):  # written by programs that need not be here; these folders are as theirs
        shutil.copytree(tmp_path / "mlx", tmp_path / name)
        report = json.loads((tmp_path / "mlx" / "export_report.json").read_text()) | {"format": name}
        (tmp_path / name / "export_report.json").write_text(json.dumps(report))
        shutil.copyfile(f"{float_model}/config.json", tmp_path / name / "config.json")
        (tmp_path / name / "model.safetensors").unlink()
        (tmp_path / name / f"model.{name}").write_bytes(b"GGUF")
    (tmp_path / "gguf" / "config.json").unlink()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.gguf").write_bytes(b"GGUF")
    command = ["evaluate", quantized, *commands["evaluate"][2:], "--reference"] if verb == "reference" else None
    for model in (*export_formats(), "gguf/model.gguf", "theirs", "theirs/model.gguf"):
        if model in ("hqq", "aqlm", "dense") or (verb == "report" and "/" in model):
            continue
        given = str(tmp_path / model)
        said = refused(capsys, [*command, given] if command else [verb, given, *commands[verb][2:]], 1)
        engines = "another engine" if "theirs" in model else ", ".join(export_formats()[model.split("/")[0]].engines)
        assert f"{model} is an export for {engines}" in said
        assert "Give the folder that it was exported from" in said
        assert (f"from, {quantized}." in said) == ("theirs" not in model)


@pytest.mark.parametrize("name", ["hqq", "dense"])
def test_an_export_that_transformers_reads_is_a_model(name, commands, quantized, tmp_path, capsys):
    printed(capsys, ["export", quantized, str(tmp_path / name), "--format", name])
    for verb in ("evaluate", "inspect", *(["report"] if name == "hqq" else [])):
        printed(capsys, [verb, str(tmp_path / name), *commands[verb][2:]])


@pytest.mark.parametrize("verb", ["train", "export", "evaluate", "inspect", "estimate", "chat"])
def test_a_folder_that_is_still_quantized_into_is_named(verb, commands, tmp_path, capsys):
    (tmp_path / "half" / ".quantizing").mkdir(parents=True)
    said = refused(capsys, [verb, str(tmp_path / "half"), *commands[verb][2:]], 1)
    assert "half holds no model yet: what quantizes into it is not finished" in said


@pytest.mark.parametrize("verb", ["quantize", "evaluate", "inspect", "chat"])
def test_float_weights_that_are_missing_or_of_another_shape_are_named(verb, commands, float_model, tmp_path, capsys):
    own = Path(copied(float_model, tmp_path / "own", without="none"))
    options = ["--dtype", "float32"] if verb == "quantize" else []
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    said = refused(capsys, [verb, str(own), *commands[verb][2:], *options], 1)
    assert "do not belong together" in said
    assert "unexpected" not in said
    (own / "config.json").write_text(json.dumps(config))
    (own / "model.safetensors").rename(own / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (own / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    said = refused(capsys, [verb, str(own), *commands[verb][2:], *options], 1)
    assert "model-00002-of-00002.safetensors is missing, which the index" in said
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_of_another_base_or_damaged(commands, quantized, adapter, float_model, tmp_path, capsys):
    other = str(tmp_path / "other")
    printed(capsys, ["quantize", float_model, other, "--group_size", "64"])
    without_weights = copied(adapter, tmp_path / "without", without="adapter_model.safetensors")
    unread = Path(copied(adapter, tmp_path / "unread", without="none"))
    (unread / "adapter_config.json").write_text("{")
    half = Path(copied(adapter, tmp_path / "half", without="none"))
    weights = half / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for verb, place in (("merge", 1), ("export", None), ("evaluate", None), ("chat", None)):
        for given, said in (
            (adapter, "was trained on"),
            (without_weights, "holds no adapter_model.safetensors"),
            (str(unread), "adapter_config.json"),
            (str(half), "damaged"),
        ):
            model = other if given == adapter else quantized
            command = list(commands[verb])
            if place is None:
                command[1:2] = [model, "--adapter", given]
                command[1:] = [command[1], *command[4:], *command[2:4]]  # positional arguments come first
            else:
                command[place] = given
                command += ["--model", model]
            assert said in refused(capsys, command, 1), command
    assert not (tmp_path / "out").exists()
    assert "adapter_config.json is damaged" in refused(capsys, ["inspect", str(unread)], 1)


def test_a_model_without_a_tokenizer(commands, float_model, quantized, adapter, text_file, tmp_path, capsys):
    bare, bare_float = (
        copied(model, tmp_path / name, without="token*") for name, model in (("q", quantized), ("f", float_model))
    )
    out = str(tmp_path / "out")
    needed = "no tokenizer"
    calibrated = ["--calibration.data", text_file]
    for command in (
        ["train", bare, *commands["train"][2:]],
        ["evaluate", bare, *commands["evaluate"][2:]],
        ["chat", bare, "--prompt", "x"],
        ["report", bare, out, "--text", text_file],
        ["export", bare, out, "--format", "mlx", "--text", text_file],
        ["merge", adapter, out, "--model", bare, "--evaluate_on", text_file],
        ["merge", adapter, out, "--model", bare, "--strategy", "calibrated", *calibrated],
        ["quantize", bare_float, out, *calibrated],
    ):
        said = refused(capsys, command, 1)
        assert needed in said, command
        assert "--tokenizer FOLDER_OR_NAME" in said
    assert not (tmp_path / "out").exists()
    printed(capsys, ["merge", adapter, out, "--model", bare])  # which needs none


def test_texts_and_rows_that_are_not_there(commands, tmp_path, capsys):
    for verb, option in (
        ("quantize", "--calibration.data"),
        ("train", "--eval_data"),
        ("merge", "--evaluate_on"),
        ("merge", "--calibration.data"),
        ("export", "--text"),
        ("report", "--text"),
    ):
        command = [*commands[verb], option, "no.txt"]
        command += ["--strategy=calibrated"] if (verb, option) == ("merge", "--calibration.data") else []
        assert f"{option} no.txt: there is no such file" in refused(capsys, command, 1)
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"text": \n')
    rows = ["train", commands["train"][1], str(tmp_path / "out"), "--data", str(tmp_path / "bad.jsonl")]
    assert "bad.jsonl cannot be read as .jsonl" in refused(capsys, rows, 1)
    for options, said, code in (
        (["--training.resume_from_checkpoint", "/no/such"], "there is no checkpoint", 1),
        (["--training.eval_strategy", "steps"], "eval_dataset", 2),
    ):
        assert said in refused(capsys, [*commands["train"], *options], code)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


# ---- the disk


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_no_space_is_said_before_anything_is_written(verb, commands, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "needs about" in refused(capsys, commands[verb], 1)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_while_training_is_said_and_the_checkpoint_before_is_kept(
    commands, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    save = TrainerState.save_to_json

    def until_the_second(self, path):
        if self.global_step == 2:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")  # torch's words
        save(self, path)

    with monkeypatch.context() as patched:
        patched.setattr(TrainerState, "save_to_json", until_the_second)
        patched.setattr(work, "is_full", lambda path: path == out)
        said = refused(capsys, commands["train"], 1)
    assert f"the disk of {out} is full ([enforce fail" in said
    assert "go on with --training.resume_from_checkpoint true" in said
    assert (out / "checkpoint-1" / "trainer_state.json").is_file()
    assert "trained 2 steps" in printed(capsys, [*commands["train"], "--training.resume_from_checkpoint", "true"])


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_before_the_report_of_a_merge_leaves_nothing(commands, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(MergeReport, "save", no_space)
        said = refused(capsys, commands["merge"], 1)
    assert f"the disk of {tmp_path / 'out'} is full; nothing was written. Free some space" in said
    assert not (tmp_path / "out").exists()
    printed(capsys, commands["merge"])
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["layers"]


@pytest.mark.parametrize("verb", ["quantize", "export"])
def test_settings_that_no_space_is_left_for_are_the_only_thing_that_is_missing(
    verb, commands, tmp_path, capsys, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr(saved_settings, "replace_file", no_space)
        said = refused(capsys, commands[verb], 1)
    out = tmp_path / "out"
    assert said.endswith(f"{out} is complete, but for the settings in {verb}.yaml (No space left on device).")
    assert (out / "config.json").is_file()
    assert not (out / f"{verb}.yaml").exists()
    if verb == "quantize":  # which goes on where it was
        printed(capsys, commands[verb])
        assert (out / "quantize.yaml").is_file()


# ---- Ctrl-C

STAGES = {
    "quantize": ["planned", "quantize_checkpoint"],
    "train": ["load_rows", "needed_tokenizer", "load_model", "prepare_model_for_kbit_training", "trained"],
    "merge": ["load_tokenizer", "load_model", "with_adapter", "merge_back", "saved_model"],
    "export": ["model_and_adapter", "export"],
    "evaluate": ["token_ids", "load_model", "with_adapter", "perplexity"],
    "inspect": ["verify_model", "load_model", "summary"],
    "estimate": ["model_on_meta", "estimate_merging", "estimate_training"],
    "report": ["load_model", "model_facts", "model_parts", "page"],
    "chat": ["needed_tokenizer", "load_model", "answer"],
}


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("verb", STAGES)
def test_an_interrupt_at_any_stage_is_one_line_and_leaves_no_output(verb, commands, tmp_path, capsys, monkeypatch):
    module = importlib.import_module(f"peft_quantlayers.cli.verbs.{verb}")
    for stage in STAGES[verb]:
        with monkeypatch.context() as patched:
            patched.setattr(module, stage, interrupt)
            assert "interrupted" in refused(capsys, commands[verb], 130), stage
        assert not (tmp_path / "out").exists(), stage


@pytest.mark.parametrize("verb", ["merge", "export", "report"])
def test_an_interrupt_at_any_file_operation_leaves_the_whole_output_or_none(verb, commands, tmp_path, capsys):
    out, state = tmp_path / "out", {"count": 0, "at": 0}

    def hook(event, arguments):
        if state["at"] and event in ("open", "os.rename", "os.mkdir") and str(tmp_path) in str(arguments[:2]):
            state["count"] += 1
            if state["count"] == state["at"]:
                raise KeyboardInterrupt

    sys.addaudithook(hook)  # stays for the process, and does nothing once "at" is 0
    try:
        for at in (1, 2, 3, 5, 8, 13, 21, 34, 55):
            state |= {"count": 0, "at": at}
            capsys.readouterr()
            code = main(commands[verb])
            state["at"] = 0
            assert code in (0, 130)
            if out.is_dir() and any(out.iterdir()):  # complete: reading it finds nothing wrong
                assert (out / "config.json").is_file()
                assert list(out.glob("*.safetensors"))
            shutil.rmtree(out, ignore_errors=True) if out.is_dir() else out.unlink(missing_ok=True)
            assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")]
    finally:
        state["at"] = 0


def test_a_closed_pipe_ends_a_verb_without_a_word_and_no_output_is_no_error(commands, capfd, monkeypatch):
    def closed(*_, **__):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    with monkeypatch.context() as patched:
        patched.setattr(work, "_print", closed)
        patched.setattr(sys.modules["quantlayers_cli.main"].os, "dup2", lambda *_: None)
        assert main(commands["inspect"]) == 1
    assert "peft-quantlayers" not in capfd.readouterr().err
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it where the shell has closed it: >&-
    assert main(["--version"]) == 0


@pytest.mark.parametrize("place", ["check_names", "leave_out_what_others_say", "help_text"])
def test_an_interrupt_before_the_work_is_one_line(place, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["quantlayers_cli.main"], place, interrupt)
    arguments = ["inspect", "--help"] if place == "help_text" else ["inspect", "m"]
    assert refused(capsys, arguments, 130).endswith("inspect: interrupted.")


def test_an_interrupt_while_packages_are_imported_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(importlib, "import_module", interrupt)
    assert refused(capsys, ["inspect", "m"], 130).endswith("interrupted. Nothing was begun.")

    def missing(name):
        raise ImportError("torch 2.0 is too old.")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert refused(capsys, ["inspect", "m"], 1).endswith("inspect: torch 2.0 is too old.")


def test_an_interrupt_while_training_keeps_the_checkpoints(commands, tmp_path, capsys, monkeypatch):
    save = TrainerState.save_to_json

    def until_the_second(self, path):
        if self.global_step == 2:
            raise KeyboardInterrupt
        save(self, path)

    with monkeypatch.context() as patched:
        patched.setattr(TrainerState, "save_to_json", until_the_second)
        assert "interrupted" in refused(capsys, commands["train"], 130)
    assert (tmp_path / "out" / "checkpoint-1").is_dir()
    assert "--training.resume_from_checkpoint true" in refused(capsys, commands["train"], 1)
    assert "trained 2 steps" in printed(capsys, [*commands["train"], "--training.resume_from_checkpoint", "true"])
