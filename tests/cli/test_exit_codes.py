"""The exit codes that docs/cli.md names, over the kinds of what is wrong: the same kind ends every verb alike.

2: an unknown option, one that is missing, a value that no file and no machine would have taken, options that exclude
each other. 1: what was found in files or on the machine, and what failed. 130: an interrupt.
"""

import importlib
import json
import shutil
from pathlib import Path

import pytest
from commands import printed, refused

from peft_quantlayers.cli import main
from quantlayers_cli.main import VERBS, WITHOUT_OPTIONS

WITH_OPTIONS = sorted(VERBS.keys() - set(WITHOUT_OPTIONS))
PAGE = Path(__file__).parents[2] / "docs" / "cli.md"

# Values that no verb takes, and a part of what is said.
OUT_OF_RANGE = {
    "quantize": [
        ("--nbits 9", "nbits"),
        ("--num_codebooks 2", "HQQConfig has no field ['num_codebooks']"),
        ("--n_processes 0", "--n_processes 0 must be at least 1"),
        ("--average_bits -1 --calibration.data TEXT", "--average_bits -1.0 must be above 0"),
        ("--average_bits 3 --choices [2,9] --calibration.data TEXT", "--choices [9]: nbits=9"),
        ("--average_bits 3 --choices [{'nbit':3}]", "for each layer (did you mean 'nbits'?)"),
        ("--overrides {'*q_proj':{'nbit':3}}", "unknown field(s) ['nbit'] in a 'hqq' spec (did you mean 'nbits'?)"),
        ("--average_bits 3 --choices [2,9]", "--choices [9]: nbits=9"),
        ("--average_bits 3 --choices [] --calibration.data TEXT", "--choices []: choices must be a list"),
        ("--size many --calibration.data TEXT", "--size many is no size"),
        ("--calibration.data TEXT --calibration.n_tokens 0", "n_tokens"),
        ("--calibration.data TEXT --calibration.damping -1", "damping"),
        ("--device no_device", "device='no_device' cannot be used here"),
        ("--device meta", "device='meta' computes nothing"),
        ("--skip_modules lm_head", "skip_modules='lm_head': expected a list: --skip_modules '[lm_head]'"),
    ],
    "train": [
        ("--lora.r 0", "--lora.r 0 must be at least 1"),
        ("--lora.target_modules ((", "is no regular expression"),
        ("--lora.lora_dropout 2", "--lora.lora_dropout 2.0 must be at least 0, and at most 1"),
        (
            "--lora.rank_pattern {'q_proj':'x'}",
            "--lora.rank_pattern {'q_proj': 'x'}: the value must be a whole number",
        ),
        ("--lora.alpha_pattern {'q_proj':[1]}", "--lora.alpha_pattern {'q_proj': [1]}: the value must be a finite"),
        ("--training.deepspeed x.json", "Leave it out, or shard the base over the processes: --fsdp_size N"),
        ("--training.max_steps 0", "trains nothing"),
        ("--training.optim no_such", "no_such is not a valid OptimizerNames"),
        ("--training.lr_scheduler_type no_such", "no_such is not a valid SchedulerType"),
        ("--training.packing true --training.packing_strategy nope", "Invalid packing strategy"),
        ("--pv.code_lr 1", "--pv.code_lr is for --adapter_type pv"),
    ],
    "merge": [
        ("--tune_epochs -1", "tune_epochs"),
        ("--evaluate_tokens 0", "--evaluate_tokens 0 must be at least 2"),
        ("--average_bits 99 --calibration.data TEXT", "--average_bits 99.0 must be above 0 and at most 32"),
        ("--average_bits 4 --choices [99] --calibration.data TEXT", "--choices [99]: nbits=99 is not supported"),
        ("--average_bits 4 --choices [3,0] --calibration.data TEXT", "--choices [0]: nbits=0 is not supported"),
        ("--average_bits 4 --choices [{'nbit':3}] --calibration.data TEXT", "(did you mean 'nbits'?)"),
    ],
    "export": [
        ("--format nope", "--format nope is not supported"),
        ("--format vllm", "vllm is an engine, which reads 'humming'"),
        ("--n_tokens 0", "--n_tokens 0 must be"),
    ],
    "evaluate": [
        ("--window 0", "--window 0 must be at least 2"),
        ("--n_tokens -5", "--n_tokens -5 must be at least 1"),
        ("--limit 0", "--limit 0 must be at least 1"),
        ("--temperature -1", "--temperature -1.0 must be at least 0"),
        ("--seed -1", "--seed -1 must be at least 0"),
        (
            "--prompts x --max_new_tokens 9999",
            "--max_new_tokens 9999 must be at most 512: MODEL has so many positions",
        ),
        ("--prompts [null]", "entry 1 is null, and no text"),
    ],
    "estimate": [
        ("--batch_size 0", "--batch_size 0 must be"),
        ("--lora.r 0", "--lora.r 0 must be"),
        ("--lora.r 999999999", "--lora.r 999999999 must be at least 1, and at most 16384"),
        ("--max_length 999999999", "--max_length 999999999 must be at most 512: MODEL has so many positions"),
    ],
    "report": [("--n_worst -1", "--n_worst -1 must be"), ("--window 1", "--window 1 must be at least 2")],
    "chat": [
        ("--max_new_tokens 0", "--max_new_tokens 0 must be"),
        ("--max_new_tokens 9999", "--max_new_tokens 9999 must be at most 512: MODEL has so many positions"),
        ("--temperature .nan", "--temperature nan must be at least 0"),
    ],
}
CHOICES = {
    "quantize": "--method",
    "train": "--trainer",
    "merge": "--strategy",
    "export": "--approximate",
    "evaluate": "--dtype",
    "chat": "--dtype",
    "estimate": "--method",
}
# Options that exclude each other, or of which one needs another.
EXCLUDING = {
    "quantize": [
        ("--average_bits 3.5", "--average_bits needs --calibration.data"),
        ("--size 1GB --plan p.json", "--size and --plan are two budgets"),
        ("--choices [3]", "--choices needs a budget"),
        ("--calibration.n_tokens 64", "--calibration.n_tokens is for a calibration, which needs --calibration.data"),
        ("--overwrite --n_processes 2", "goes from files to files, which --overwrite does not"),
        ("--overwrite --resume false", "--resume false is for what goes from files to files"),
    ],
    "evaluate": [("--n_tokens 9 --window 64", "--n_tokens 9 is less than --window 64")],
    "train": [
        ("--merged_output x", "--merged_output is for --merge STRATEGY"),
        ("--adapter_type scales --lora.r 4", "--lora.r is for --adapter_type lora, and it is scales"),
        ("--adapter_type scales --lora.target_modules [q_proj]", "--lora.target_modules is for --adapter_type lora"),
        ("--scales.train [scales]", "--scales.train is for --adapter_type scales, and it is lora"),
        ("--adapter_type scales --merge_aware true", "--merge_aware true is for LoRA"),
        ("--training.eval_strategy steps", "eval_dataset"),
        ("--adapter_type pv --merge auto", "there is no adapter"),
    ],
    "merge": [
        ("--tune_epochs 2", "--tune_epochs 2 needs --calibration.data FILE"),
        ("--calibration.damping 0.1", "--calibration.damping is for a calibration, which needs --calibration.data"),
        ("--strategy keep --calibration.data TEXT", "takes no calibration data"),
        ("--average_bits 3.5", "--average_bits needs --calibration.data"),
    ],
    "export": [
        ("--approximate 8bit", "--approximate 8bit: mlx takes none"),
        ("--format awq --approximate 8bit", "awq takes --approximate adapter or --approximate requantize"),
        ("--float_model x", "--float_model is for --approximate requantize"),
        ("--calibration.data TEXT", "--calibration.data is for --approximate requantize"),
        ("--calibration.n_tokens 64", "--calibration.n_tokens is for a calibration, which needs"),
    ],
    "chat": [("--compare", "--compare needs --adapter")],
}


def test_the_page_names_the_codes():
    assert "Exit codes: 0 done, 1 it failed or found damage, 2 wrong usage" in PAGE.read_text().replace("\n", " ")


@pytest.mark.parametrize("verb", WITH_OPTIONS)
def test_wrong_usage_of_every_kind_ends_with_2(verb, commands, text_file, tmp_path, capsys):
    command = commands[verb]
    cases = [*OUT_OF_RANGE.get(verb, []), *EXCLUDING.get(verb, []), ("--no_such 1", "there is no option --no_such")]
    if verb in CHOICES:
        cases.append((f"{CHOICES[verb]} nope", "choose one of"))
    for options, said in cases:
        given = [text_file if option == "TEXT" else option for option in options.split()]
        assert said.replace("MODEL", command[1]) in refused(capsys, [*command, *given], 2), options
    assert main([verb]) == 2  # without what it needs
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", WITH_OPTIONS)
def test_what_files_hold_ends_with_1(verb, commands, quantized, float_model, tmp_path, capsys):
    command, out = commands[verb], tmp_path / "out"
    place = 1
    missing = [*command[:place], "./no/such/folder", *command[place + 1 :]]
    assert "no such folder" in refused(capsys, missing, 1)
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(capsys, [*command[:place], str(empty), *command[place + 1 :]], 1)
    if verb in ("quantize", "train", "merge", "export"):
        out.mkdir()
        (out / "mine.txt").write_text("mine")
        assert "not empty" in refused(capsys, command, 1)
        assert (out / "mine.txt").read_text() == "mine"
        shutil.rmtree(out)
    if verb == "train":
        (tmp_path / "bad.jsonl").write_text(json.dumps({"text": 5}))
        assert "is 5, and no text" in refused(capsys, [*command, "--data", str(tmp_path / "bad.jsonl")], 1)
        assert "nope" in refused(capsys, [*command, "--lora.target_modules", "[nope]"], 1)
        template = ["--training.chat_template_path", "no.jinja"]
        assert "no.jinja: there is no such file" in refused(capsys, [*command, *template], 1)
        assert "initialize_loftq" in refused(capsys, [*command, "--lora.init_lora_weights", "loftq"], 1)
        assert "for a float model" in refused(capsys, [*command, "--quantization.nbits", "3"], 1)
    if verb == "quantize":
        assert "is quantized already" in refused(capsys, ["quantize", quantized, str(out)], 1)


@pytest.mark.parametrize("verb", WITH_OPTIONS)
def test_done_ends_with_0_and_an_interrupt_with_130(verb, commands, capsys, monkeypatch):
    printed(capsys, commands[verb])

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(f"peft_quantlayers.cli.verbs.{verb}"), "run", interrupt)
    assert "interrupted" in refused(capsys, commands[verb], 130)
