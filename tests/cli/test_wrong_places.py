"""Folders and files that cannot be what they are named for: one line, an exit code, and all as it was before."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from commands import printed, refused
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from peft_quantlayers.cli import main


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused_untouched(capsys, arguments: list[str], folder: Path, exit_code: int = 1) -> str:
    before = contents(folder)
    said = refused(capsys, arguments, exit_code)
    assert contents(folder) == before, arguments
    return said


def copied(source: str, destination: Path) -> str:
    shutil.copytree(source, destination)
    return str(destination)


# ---- outputs

WRITING = ["quantize", "train", "merge", "export", "report"]


@pytest.mark.parametrize("verb", WRITING)
@pytest.mark.parametrize("options", [[], ["--dry_run"]], ids=["", "dry"])
def test_an_output_that_cannot_be_made_is_refused_before_the_work(verb, options, commands, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for output, said in (
        (tmp_path / "file" / "below", "file"),
        (tmp_path / ("x" * 300), "File name too long"),
        *([("/proc/x", "/proc/x cannot be made: No such file or directory")] if Path("/proc/self").exists() else []),
        ("a\0b", "the character 0"),
        ("", "--output is empty"),
    ):
        command = [*commands[verb][:2], str(output), *commands[verb][3:], *options]
        assert said in refused_untouched(capsys, command, tmp_path, 1 if str(output).strip("a\0b") else 2)


def test_an_output_that_may_not_be_written_is_refused(commands, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # who runs tests may write anywhere
    for verb in WRITING:
        assert "there is no permission" in refused_untouched(capsys, commands[verb], tmp_path)


@pytest.mark.parametrize("verb", ["quantize", "train", "merge", "export"])
def test_what_is_read_is_never_written_over(verb, float_model, quantized, adapter, commands, tmp_path, capsys):
    own = copied({"quantize": float_model, "merge": adapter}.get(verb, quantized), tmp_path / "own")
    command = [verb, own, own, *commands[verb][3:], "--overwrite"]
    assert "is read, and would be replaced" in refused_untouched(capsys, command, tmp_path)


def test_a_merge_does_not_write_over_its_base_nor_a_report_over_a_model(quantized, adapter, tmp_path, capsys):
    base = copied(quantized, tmp_path / "base")
    command = ["merge", adapter, base, "--model", base, "--overwrite"]
    assert "is read, and would be replaced" in refused_untouched(capsys, command, tmp_path)
    said = refused_untouched(capsys, ["report", base, f"{base}/config.json", "--n_worst", "0"], tmp_path)
    assert "config.json is there, and no page" in said


def test_a_model_and_an_adapter_do_not_get_into_one_folder(quantized, adapter, commands, tmp_path, capsys):
    model, own = copied(quantized, tmp_path / "model"), copied(adapter, tmp_path / "own")
    for command, said in (
        (["train", quantized, model, *commands["train"][3:], "--overwrite"], "holds a model (config.json)"),
        (["export", quantized, own, "--format", "mlx", "--overwrite"], "holds an adapter (adapter_config.json)"),
    ):
        assert said in refused_untouched(capsys, command, tmp_path)


# ---- models and adapters


def as_json(change):
    def changed(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return changed


DAMAGED_CONFIGS = {
    "a list": (lambda path: path.write_text("[1]"), "config.json describes no model"),
    "an unknown type": (as_json(lambda c: c.update(model_type="nope")), "config.json describes no model"),
    "a text for a size": (as_json(lambda c: c.update(hidden_size="big")), "config.json describes no model"),
    "a negative size": (as_json(lambda c: c.update(hidden_size=-64)), "no model can be made as its config.json says"),
}


@pytest.mark.parametrize("name", DAMAGED_CONFIGS)
def test_a_config_that_describes_no_model(name, float_model, tmp_path, capsys):
    damage, said = DAMAGED_CONFIGS[name]
    model = copied(float_model, tmp_path / "model")
    damage(tmp_path / "model" / "config.json")
    for command in (["quantize", model, str(tmp_path / "out")], ["estimate", model]):
        found = refused_untouched(capsys, command, tmp_path)
        assert model in found
        assert said in found


def test_a_file_in_the_place_of_a_model(text_file, commands, tmp_path, capsys):
    for verb in ("quantize", "train", "export", "evaluate", "inspect", "estimate", "chat"):
        command = [verb, text_file, *commands[verb][2:]]
        assert f"{text_file} is a file. Name the folder of a model" in refused_untouched(capsys, command, tmp_path)


def test_weights_and_tokenizers_that_cannot_be_read_are_named(float_model, quantized, text_file, tmp_path, capsys):
    for source, file, options, said in (
        (float_model, "model.safetensors", ["--dtype", "float32"], "its weights are damaged or incomplete"),
        (float_model, "model.safetensors", [], "model.safetensors is damaged or incomplete"),
        (float_model, "tokenizer.json", [], "its tokenizer (tokenizer.json, tokenizer_config.json) cannot be read"),
        (float_model, "tokenizer_config.json", ["--dtype", "float32"], "cannot be read"),
    ):
        model = copied(source, tmp_path / "model")
        path = tmp_path / "model" / file
        path.write_bytes(path.read_bytes()[:1000] if file.startswith("model") else b"[")
        found = refused_untouched(capsys, ["quantize", model, str(tmp_path / "out"), *options], tmp_path)
        assert model in found
        assert said in found
        shutil.rmtree(model)
    for options in (["--tokenizer", str(tmp_path / "none")], ["--tokenizer", text_file]):
        refused_untouched(capsys, ["quantize", float_model, str(tmp_path / "out"), *options], tmp_path)


DAMAGED_ADAPTERS = {
    "a list": lambda path: path.write_text("[1]"),
    "an unknown type": as_json(lambda c: c.update(peft_type="NOPE")),
    "a text for the rank": as_json(lambda c: c.update(r="many")),
    "a number for the base": as_json(lambda c: c.update(base_model_name_or_path=5)),
    "another rank": as_json(lambda c: c.update(r=8)),
    "other layers": as_json(lambda c: c.update(target_modules=["nope"])),
}


@pytest.mark.parametrize("name", DAMAGED_ADAPTERS)
def test_the_config_of_an_adapter_that_none_can_have(name, quantized, adapter, commands, tmp_path, capsys):
    own = copied(adapter, tmp_path / "own")
    DAMAGED_ADAPTERS[name](tmp_path / "own" / "adapter_config.json")
    for command in (["merge", own, str(tmp_path / "out")], [*commands["evaluate"], "--adapter", own]):
        said = refused_untouched(capsys, command, tmp_path)
        assert f"--adapter {own}" in said
        assert len(said) < 700


def test_a_text_that_the_model_cannot_read(quantized, text_file, tmp_path, capsys):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    for name, vocab_size, window in (("small", 50, "32"), ("short", 300, "600")):
        GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=512, **sizes)).save_pretrained(tmp_path / name)
        command = ["evaluate", str(tmp_path / name), "--tokenizer", quantized, "--text", text_file]
        said = refused_untouched(capsys, [*command, "--window", window, "--n_tokens", "700"], tmp_path)
        assert ("do not belong together" if name == "small" else "cannot read 600 tokens at once: it has 512") in said
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": [1, 2, 999] * 200}))
    for command in (["evaluate", quantized], ["report", quantized, str(tmp_path / "p.html"), "--n_worst", "0"]):
        said = refused_untouched(capsys, [*command, "--text", str(tmp_path / "ids.jsonl")], tmp_path)
        assert "token ids from 1 to 999, and the model" in said
    chat = ["chat", str(tmp_path / "short"), "--tokenizer", quantized, "--prompt", "x" * 510]
    printed(capsys, chat)  # two tokens, for which there are positions
    chat += ["--max_new_tokens", "256"]
    assert "cannot read 766 tokens at once" in refused_untouched(capsys, chat, tmp_path)
    rotary = ["evaluate", quantized, "--prompts", "x" * 300, "--max_new_tokens", "300"]  # which computes, but badly
    assert f"{quantized} cannot read 600 tokens at once: it has 512" in refused_untouched(capsys, rotary, tmp_path)


NOT_FINITE = "model.layers.1.self_attn.q_proj"
FEW_TOKENS = ["--calibration.n_tokens", "256", "--calibration.sequence_length", "64"]


@pytest.mark.parametrize("verb", ["quantize", "calibrated", "processes", "in memory", "train"])
def test_weights_that_are_not_finite_are_named_once_and_nothing_useless_is_left(
    verb, float_model, text_file, commands, tmp_path, capsys
):
    own, out = copied(float_model, tmp_path / "own"), tmp_path / "out"
    file = tmp_path / "own" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{NOT_FINITE}.weight"][3, 4] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    command = {
        "train": ["train", own, str(out), *commands["train"][3:]],
        "calibrated": ["quantize", own, str(out), "--calibration.data", text_file, *FEW_TOKENS],
        "processes": ["quantize", own, str(out), "--n_processes", "2"],
        "in memory": ["quantize", own, str(out), "--dtype", "float32"],
    }.get(verb, ["quantize", own, str(out)])
    said = refused(capsys, command, 1)
    assert said.count("holds NaN or Inf") == 1
    assert f"{NOT_FINITE}: the weight holds" in said
    assert f"--skip_modules '[{NOT_FINITE}]'" in said  # in quotes: a shell takes brackets for a pattern of files
    if verb != "calibrated":
        assert not out.exists()
        return
    assert "2 of 3 parts are finished and kept" in said
    assert "starts from scratch: --resume false" in said
    printed(capsys, [*command, "--skip_modules", f"[{NOT_FINITE}]", "--resume", "false"])


@pytest.mark.parametrize("kind", ["adapter", "pickled adapter", "model", "float model"])
def test_tensors_that_are_not_finite_are_named_by_inspect_and_report(
    kind, adapter, quantized, float_model, tmp_path, capsys
):
    own = copied({"model": quantized, "float model": float_model}.get(kind, adapter), tmp_path / "own")
    file = next((tmp_path / "own").glob("*.safetensors"))
    tensors = load_file(file)
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    first, second = [name for name in names if kind != "model" or name.endswith(".scale")][:2]
    tensors[first].view(-1)[0], tensors[second].view(-1)[1] = float("nan"), float("inf")
    save_file(tensors, file, {"format": "pt"})
    if kind == "pickled adapter":
        torch.save(tensors, tmp_path / "own" / "adapter_model.bin")
        file.unlink()
    said = printed(capsys, ["inspect", own], exit_code=1)
    assert f"NaN or Inf in 2 tensors: {first}, {second}." in said
    assert json.loads(printed(capsys, ["inspect", own, "--json"], exit_code=1))["not_finite"] == [first, second]
    if "model" in kind:  # the one has no quantized layer, the other one is not loaded
        said = refused(capsys, ["report", own], 1)
        assert kind == "float model" or any(f"{name} holds NaN or Inf" in said for name in (first, second))
        return
    said = printed(capsys, ["report", own, str(tmp_path / "page.html")], exit_code=1)
    assert f"NaN or Inf in 2 tensors: {first}, {second}." in said
    assert f"NaN or Inf in 2 tensors: {first}, {second}." in (tmp_path / "page.html").read_text()


def test_a_model_that_predicts_nan_is_bad_news(float_model, text_file, tmp_path, capsys):
    own = copied(float_model, tmp_path / "own")
    file = tmp_path / "own" / "model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    text = printed(capsys, ["evaluate", own, "--text", text_file, "--n_tokens", "64", "--window", "32"], exit_code=1)
    assert "the model predicts NaN" in text


def test_a_page_on_what_is_damaged_or_of_another_model(quantized, tmp_path, capsys):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=50, **sizes)).save_pretrained(tmp_path / "other")
    model, page = copied(quantized, tmp_path / "model"), str(tmp_path / "page.html")
    said = refused_untouched(capsys, ["report", model, page, "--float_model", str(tmp_path / "other")], tmp_path)
    assert "has none of the 14 quantized layers" in said
    said = refused_untouched(capsys, ["report", model, str(tmp_path / "no" / "page.html")], tmp_path)
    assert "there is no folder" in said
    for text in ("a: [", "- a"):
        (tmp_path / "model" / "quantize.yaml").write_text(text)
        said = refused_untouched(capsys, ["report", model, page], tmp_path)
        assert "quantize.yaml holds no settings" in said
        assert "--float_model" in said


def test_numbers_of_chat_and_estimate_and_templates(quantized, commands, tmp_path, capsys):
    own = copied(quantized, tmp_path / "own")
    (tmp_path / "own" / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    (tmp_path / "c.yaml").write_text("temperature: .nan\n")
    for command, said in (
        ([*commands["chat"], "--max_new_tokens", "0"], "--max_new_tokens 0 must be at least 1"),
        ([*commands["chat"], "--temperature", "-1"], "--temperature -1.0 must be at least 0"),
        ([*commands["chat"], "--config", str(tmp_path / "c.yaml")], "--temperature nan must be"),
        (["chat", quantized, "--prompt", ""], "the message is empty"),
        (["chat", own, "--prompt", "x"], "does not take these messages: no"),
        ([*commands["estimate"], "--batch_size", "9" * 25], "must be at least 1, and at most"),
        ([*commands["estimate"], "--nbits", "3"], "quantized already, and --nbits is for a float model"),
        ([*commands["estimate"], "--lora.r", "0"], "--lora.r 0 must be at least 1"),
        ([*commands["estimate"], "--lora.target_modules", "(("], "'((' is no regular expression"),
        ([*commands["evaluate"], "--limit", "0"], "--limit 0 must be at least 1"),
        ([*commands["evaluate"], "--reference", str(tmp_path)], "holds no model"),
        ([*commands["quantize"], "--device", "meta"], "device='meta' computes nothing"),
        ([*commands["quantize"], "--plan", str(tmp_path)], "--plan"),
    ):
        is_of_files = any(word in said for word in ("message", "already", "holds no model", "--plan"))
        assert said in refused_untouched(capsys, command, tmp_path, 1 if is_of_files else 2), command


def test_another_export_format_is_refused_in_a_dry_run_too(quantized, tmp_path, capsys):
    command = ["export", quantized, str(tmp_path / "out"), "--format", "nope", "--dry_run"]
    assert "--format nope is not supported" in refused_untouched(capsys, command, tmp_path, 2)


def test_an_adapter_whose_weights_are_of_another_rank_is_one_mismatch_long(adapter, tmp_path, capsys):
    own = copied(adapter, tmp_path / "own")
    file = tmp_path / "own" / "adapter_model.safetensors"
    save_file({name: tensor[:, :8].contiguous() for name, tensor in load_file(file).items()}, file)
    said = refused_untouched(capsys, ["merge", own, str(tmp_path / "out")], tmp_path)
    assert said.count("size mismatch") <= 1


# ---- run and autoload


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "FOLDER"], "is a folder without a __main__.py"),
        (["run", "FOLDER/script.sh"], "is no Python script. Give the program that reads it first"),
        (["run", "-m", ".relative"], "there is no module .relative"),
        (["run", "-m", "yaml"], "yaml is a package without a __main__"),
        (["autoload", "more"], "'more' is one argument too many"),
    ],
)
def test_what_is_no_program(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pql"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    (tmp_path / "script.sh").write_text("#!/bin/sh\necho\n")
    assert main([argument.replace("FOLDER", str(tmp_path)) for argument in arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "option"),
    [("quantize", "--calibration.data"), ("merge", "--calibration.data"), ("merge", "--evaluate_on")],
)
def test_data_that_is_not_there_is_refused_in_a_dry_run_too(verb, option, commands, tmp_path, capsys):
    line = [*commands[verb], option, "no.txt", "--dry_run"]
    line += ["--strategy=calibrated"] if (verb, option) == ("merge", "--calibration.data") else []
    assert f"{option} no.txt: there is no such file" in refused(capsys, line, 1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "x"}, "has the columns ['question']. Rows hold text, messages or conversations"),
        ({"prompt": "a", "completion": 5}, "line 1: completion is 5, and no text"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "a row has text and messages in prompt"),
    ],
)
def test_rows_that_hold_no_text_are_named(row, said, commands, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    command = [*commands["evaluate"][:2], "--text", str(tmp_path / "rows.jsonl")]
    assert said in refused(capsys, command, 1)


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
MIXED = {
    "a chat, then a pair": (
        [{"messages": CHAT}, {"prompt": "x", "completion": "y"}],
        "prompt and completion",
        "messages",
    ),
    "a pair, then a chat": (
        [{"prompt": "x", "completion": "y"}, {"messages": CHAT}],
        "messages",
        "prompt and completion",
    ),
    "a text, then a pair": ([{"text": "x"}, {"prompt": "x", "completion": "y"}], "prompt and completion", "text"),
    "a pair, then alpaca": (
        [{"prompt": "x", "completion": "y"}, {"instruction": "x", "output": "y"}],
        "instruction",
        "prompt",
    ),
}
READING = {
    "quantize": ["quantize", "FLOAT", "OUT", "--calibration.data"],
    "train": ["train", "MODEL", "OUT", "--data"],
    "text": ["evaluate", "MODEL", "--text"],
    "prompts": ["evaluate", "MODEL", "--prompts"],
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("verb", READING)
def test_rows_of_two_forms_in_one_file_are_both_named(name, verb, quantized, float_model, tmp_path, capsys):
    rows, second, first = MIXED[name]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    places = {"FLOAT": float_model, "MODEL": quantized, "OUT": str(tmp_path / "out")}
    command = [places.get(word, word) for word in READING[verb]]
    said = refused_untouched(capsys, [*command, str(tmp_path / "rows.jsonl")], tmp_path)
    assert f"rows.jsonl: line 2 has {second}" in said
    assert f", and line 1 has {first}" in said


def test_a_suffix_in_capitals_is_the_same_suffix(quantized, float_model, tmp_path, capsys):
    (tmp_path / "ROWS.JSONL").write_text("\n".join([json.dumps({"text": "The lamp is red."})] * 8))
    (tmp_path / "TEXT.TXT").write_text("The lamp is red.\n\n" * 8)
    (tmp_path / "Q.YAML").write_text("group_size: 32\ndry_run: true\n")
    for file in ("ROWS.JSONL", "TEXT.TXT"):
        found = ["evaluate", quantized, "--window", "32", "--max_new_tokens", "2", "--limit", "1"]
        printed(capsys, [*found, "--text", str(tmp_path / file), "--prompts", str(tmp_path / file)])
    printed(capsys, ["quantize", str(tmp_path / "Q.YAML"), float_model, str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty or no JSON"),
        (b"no json", "it is empty or no JSON"),
        (b"[1]", "its JSON is no object with 'format'"),
        (b'{"a": 1}', "its JSON is an object without 'format'"),
        (b'{"format": "peft_quantlayers bit plan"}', "'version' is missing in it"),
        (b"\xff\xfe\x00", "it is no text"),
    ],
)
@pytest.mark.parametrize("verb", ["quantize", "merge"])
def test_a_file_that_is_no_plan(content, said, verb, commands, tmp_path, capsys):
    (tmp_path / "plan.json").write_bytes(content)
    found = refused_untouched(capsys, [*commands[verb], "--plan", str(tmp_path / "plan.json")], tmp_path)
    assert f"plan.json is no plan of bits that this version reads ({said}" in found
    assert "The output of --average_bits or --size holds one, bit_plan.json." in found


NO_ROWS = {
    "null.jsonl": (b"null\n", "line 1 holds null, and a row looks like"),  # datasets crashes at it
    "null.json": (b"\n null", "it holds null, and a row looks like"),
    "number.json": (b"5", "it holds 5, and a row looks like"),
    "text.json": (b'"a"', "it holds 'a', and a row looks like"),
    "nothing.json": (b"[]", "it holds no rows"),
    "blank.jsonl": (b"\n\n", "it holds no rows"),
    "blank.txt": (b" \n\n ", "holds no"),
    "bytes.txt": (bytes(range(256)), "is no text in UTF-8"),
    "bytes.jsonl": (bytes(range(256)), "line 1 is no JSON"),
    "empty.txt": (b"", "is empty"),
    "empty.parquet": (b"", "is empty"),
    "damaged.parquet": (b"PAR1 and no more", "cannot be read as .parquet"),
    "table.tsv": (b"text\tx\n", "a file of this kind is not read"),
}


@pytest.mark.parametrize("name", NO_ROWS)
@pytest.mark.parametrize("verb", READING)
def test_files_that_hold_no_rows_are_refused_by_every_verb_that_reads_some(
    name, verb, quantized, float_model, tmp_path, capsys
):
    content, said = NO_ROWS[name]
    (tmp_path / name).write_bytes(content)
    places = {"FLOAT": float_model, "MODEL": quantized, "OUT": str(tmp_path / "out")}
    command = [*(places.get(word, word) for word in READING[verb]), str(tmp_path / name)]
    if (verb, name) == ("quantize", "blank.txt"):
        said = "the calibration data has 0 tokens"
    found = refused_untouched(capsys, command, tmp_path)
    assert name in found or said.endswith("0 tokens")
    assert said in found


@pytest.mark.parametrize("verb", READING)
def test_folders_and_files_below_files_are_no_data(verb, quantized, float_model, text_file, tmp_path, capsys):
    places = {"FLOAT": float_model, "MODEL": quantized, "OUT": str(tmp_path / "out")}
    command = [places.get(word, word) for word in READING[verb]]
    for given, said in ((quantized, "save_to_disk"), (f"{text_file}/below", "there is no such file")):
        assert said in refused_untouched(capsys, [*command, given], tmp_path)


ODD_NAME = "ünï 空 'q\" [x] a*b ? $HOME"


@pytest.mark.parametrize(
    "verb", ["quantize", "train", "merge", "export", "evaluate", "inspect", "estimate", "report", "chat"]
)
def test_folders_and_files_of_any_name(verb, float_model, quantized, adapter, text_file, commands, tmp_path, capsys):
    odd = tmp_path / ODD_NAME
    odd.mkdir()
    for number, source in enumerate((float_model, quantized, adapter)):
        shutil.copytree(source, odd / str(number))
    shutil.copy(text_file, odd / "text ü.txt")
    shutil.copy(tmp_path / "rows.jsonl", odd / "rows [1].jsonl")
    places = {
        float_model: odd / "0",
        quantized: odd / "1",
        adapter: odd / "2",
        text_file: odd / "text ü.txt",
        str(tmp_path / "rows.jsonl"): odd / "rows [1].jsonl",
        str(tmp_path / "out"): odd / "out [y]",
    }
    command = [str(places.get(word, word)) for word in commands[verb]]
    printed(capsys, command)
    if verb in ("quantize", "train", "merge", "export"):
        saved = odd / "out [y]" / f"{verb}.yaml"
        shutil.move(saved, tmp_path / "again.yaml")
        printed(capsys, [verb, str(tmp_path / "again.yaml"), "--output", str(odd / "again")])


@pytest.mark.parametrize("verb", ["quantize", "train", "merge", "export"])
def test_an_output_that_is_a_link_is_written_through_it(verb, commands, tmp_path, capsys):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    printed(capsys, commands[verb])
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / f"{verb}.yaml").is_file()


@pytest.mark.parametrize("folder", ["float_model", "adapter", "file"])
def test_blocks_of_a_calibration_are_not_kept_where_a_model_is(folder, commands, text_file, request, tmp_path, capsys):
    given = text_file if folder == "file" else request.getfixturevalue(folder)
    data = ["--calibration.data", text_file, "--calibration.resume_folder", given]
    said = refused_untouched(capsys, [*commands["quantize"], *data], tmp_path)
    assert f"--calibration.resume_folder {given} is" in said


@pytest.mark.parametrize(
    "verb", ["quantize", "train", "merge", "export", "evaluate", "inspect", "estimate", "report", "chat"]
)
def test_weights_that_may_not_be_read(verb, commands, float_model, quantized, adapter, tmp_path, capsys, monkeypatch):
    """Who runs tests may read anything, so the answers of the system are those of one who may not."""
    source = {"quantize": float_model, "merge": adapter}.get(verb, quantized)
    (file,) = Path(source).glob("*.safetensors")
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: access(path, mode) and (Path(path) != file or mode != os.R_OK)
    )
    command = [*commands[verb], *(["--dtype", "float32"] if verb == "quantize" else [])]
    said = refused_untouched(capsys, command, tmp_path)
    assert f"{file.name} cannot be read: there is no permission" in said
