"""``train --merge --evaluate --export`` does what the verbs do by hand; what cannot work is refused at the start."""

import gc
import json
import os
import shlex
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from commands import TEXT, printed, refused
from hub import put_in_hub
from peft import PeftModel
from safetensors.torch import load_file
from test_train import PAIRS, with_settings
from test_wrong_places import contents, refused_untouched
from transformers import AutoTokenizer

from peft_quantlayers.cli import main
from peft_quantlayers.cli.verbs import evaluate, export, merge, train
from peft_quantlayers.exports.formats.gguf import GgufFormat

STEPS = {"max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
ROWS = [{"text": TEXT[:400]}] * 8
END = {"merge": "calibrated", "evaluate": True, "evaluate_options": {"window": 64}, "export": "mlx"}
RESUMED = ["--training.resume_from_checkpoint", "true"]


def with_end(tmp_path, model, text_file, **settings) -> list[str]:
    return with_settings(tmp_path, ROWS, model=model, eval_data=text_file, training=STEPS, **{**END, **settings})


def record_of(folder: Path) -> dict:
    return json.loads((folder / "after_training.json").read_text())


def test_the_end_is_what_the_verbs_do_by_hand(quantized, text_file, tmp_path, capsys):
    out = tmp_path / "out"
    found = json.loads(printed(capsys, [*with_end(tmp_path, quantized, text_file), "--output", str(out), "--json"]))
    assert found["merge"]["strategy"] == "calibrated"
    assert found["evaluate"] == json.loads((out / "evaluation.json").read_text())
    assert found["evaluate"]["reference"] == str(out)
    assert found["evaluate"]["kl"] >= 0
    for folder, file in (("merged", "merge.yaml"), ("exported", "export.yaml")):
        assert (out / folder / file).is_file()
    # On the rows of the training, since no other text was given for the calibration.
    assert yaml.safe_load((out / "merged" / "merge.yaml").read_text())["calibration"]["data"].endswith("rows.jsonl")
    names = {"merge": "merged", "export": "exported"}
    for verb, step in record_of(out).items():
        command = shlex.split(step["command"])[1:]
        if verb == "evaluate":
            assert json.loads(printed(capsys, [*command, "--json"])) == found["evaluate"]
            continue
        command[2] = str(tmp_path / f"{verb} by hand")
        printed(capsys, command)
        at_the_end, by_hand = (load_file(Path(each) / "model.safetensors") for each in (out / names[verb], command[2]))
        assert at_the_end.keys() == by_hand.keys()
        assert all(at_the_end[name].equal(by_hand[name]) for name in by_hand), verb


def test_options_of_the_verbs_may_be_given(quantized, text_file, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--merge_options.calibration.data", text_file, "--merge_options.calibration.n_tokens", "256"]
    options += [
        "--merge_options.evaluate_on",
        text_file,
        "--evaluate",
        text_file,
        "--evaluate_options.n_tokens",
        "128",
    ]
    options += ["--export_options.text", text_file, "--export_options.n_tokens", "256"]
    options += ["--evaluate_options.reference", quantized]
    printed(capsys, [*with_end(tmp_path, quantized, text_file), "--output", str(out), *options])
    report = json.loads((out / "merged" / "merge_report.json").read_text())
    assert report["capture"] is not None
    found = json.loads((out / "evaluation.json").read_text())
    assert (found["n_tokens"], found["reference"]) == (128, quantized)
    assert json.loads((out / "exported" / "export_report.json").read_text())["kl"] is not None
    assert yaml.safe_load((out / "train.yaml").read_text())["merge_options"]["calibration"]["n_tokens"] == 256


def test_without_a_merge_the_adapter_is_measured_beside_its_base_and_exported_with_it(
    float_model, text_file, tmp_path, capsys
):
    quantization = {"nbits": 4, "group_size": 32, "symmetric": True}
    out = tmp_path / "out"
    command = with_end(tmp_path, float_model, text_file, merge=None, export="gptq", quantization=quantization)
    printed(capsys, [*command, "--output", str(out)])
    found = json.loads((out / "evaluation.json").read_text())
    assert (found["model"], found["adapter"], found["reference"]) == (str(out / "base"), str(out), str(out / "base"))
    assert found["kl"] > 0
    assert list((out / "exported").rglob("adapter_config.json"))
    assert not (out / "merged").exists()


def test_preferences_are_calibrated_and_measured_on_what_was_chosen(quantized, tmp_path, capsys):
    (tmp_path / "held_out.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    command = with_settings(
        tmp_path, PAIRS * 8, model=quantized, trainer="dpo", training=STEPS, eval_data=str(tmp_path / "held_out.jsonl")
    )
    out = tmp_path / "out"
    printed(
        capsys,
        [
            *command,
            "--output",
            str(out),
            "--merge",
            "calibrated",
            "--evaluate",
            "true",
            "--evaluate_options.window",
            "16",
        ],
    )
    tokenizer = AutoTokenizer.from_pretrained(quantized)
    n_tokens = sum(len(tokenizer(row["prompt"] + row["chosen"]).input_ids) for row in PAIRS)
    assert json.loads((out / "evaluation.json").read_text())["n_tokens"] == n_tokens


def test_what_pv_tuning_has_trained_is_measured_beside_what_it_was(float_model, text_file, tmp_path, capsys):
    out = tmp_path / "out"
    command = with_settings(tmp_path, ROWS, model=float_model, adapter_type="pv", training={"max_steps": 1})
    command += ["--quantization.method", "aqlm", "--quantization.nbits_per_codebook", "4"]
    command += ["--evaluate", text_file, "--evaluate_options.window", "64"]
    printed(capsys, [*command, "--output", str(out)])
    found = json.loads((out / "evaluation.json").read_text())
    assert (found["model"], found["reference"]) == (str(out), str(out / "base"))


def test_a_dry_run_says_the_commands(quantized, text_file, tmp_path, capsys):
    command = [*with_end(tmp_path, quantized, text_file), "--output", str(tmp_path / "out"), "--dry_run"]
    shown = printed(capsys, command)
    out = tmp_path / "out"
    assert f"then:\n  peft-quantlayers merge {out} {out}/merged --calibration.data" in shown
    assert f"  peft-quantlayers evaluate {out}/merged --reference {out} --text {text_file} --window 64\n" in shown
    assert f"  peft-quantlayers export {out}/merged {out}/exported --format mlx\n" in shown
    assert not out.exists()


def test_nothing_of_the_trained_model_is_left_when_another_one_is_loaded(
    quantized, text_file, tmp_path, capsys, monkeypatch
):
    load_model = merge.load_model

    def checked(*arguments, **options):
        assert not [each for each in gc.get_objects() if isinstance(each, PeftModel)]
        return load_model(*arguments, **options)

    monkeypatch.setattr(merge, "load_model", checked)
    printed(capsys, [*with_end(tmp_path, quantized, text_file), "--output", str(tmp_path / "out")])


# Options, a part of what is said, the exit code.
REFUSED = [
    ("--evaluate true", "--evaluate true measures on --eval_data, which is not given", 2),
    ("--merge_options.tune_epochs 1", "--merge_options.tune_epochs is for --merge STRATEGY, which is not given", 2),
    ("--evaluate_options.window 64", "--evaluate_options.window is for --evaluate FILE, which is not given", 2),
    ("--export_options.n_tokens 64", "--export_options.n_tokens is for --export FORMAT, which is not given", 2),
    ("--export_output OUT", "--export_output is for --export FORMAT, which is not given", 2),
    ("--merge aware", "--merge aware needs --merge_aware true", 2),
    ("--adapter_type scales --merge keep", "--merge keep is for LoRA, and tuned scales merge exactly", 2),
    ("--merge append", "hqq weights cannot be extended", 1),
    ("--merge keep --lora.use_dora true", "--merge keep supports plain LoRA", 1),
    ("--merge keep --merge_options.calibration.data TEXT", "--merge keep takes no calibration data", 2),
    ("--merge auto --merge_options.tune_epochs -1", "tune_epochs", 2),
    ("--merge auto --merge_options.average_bits 99", "--merge_options.average_bits 99.0 must be above 0", 2),
    ("--merge dense --merge_options.average_bits 4", "--merge dense", 1),
    (
        "--merge calibrated --merge_options.calibration.data no.txt",
        "--merge_options.calibration.data no.txt: there",
        1,
    ),
    ("--merge calibrated --data SHORT", "give other text, --merge_options.calibration.data FILE", 1),
    (
        "--merge auto --merge_options.evaluate_on no.txt",
        "--merge_options.evaluate_on no.txt: there is no such file",
        1,
    ),
    ("--evaluate no.txt", "--evaluate no.txt: there is no such file", 1),
    ("--evaluate TEXT --evaluate_options.window 0", "--evaluate_options.window 0 must be at least 2", 2),
    ("--evaluate TEXT --evaluate_options.window 100000", "is less than --evaluate_options.window 100000", 2),
    ("--evaluate TEXT --evaluate_options.window 16000", "a smaller window: --evaluate_options.window N", 1),
    ("--evaluate TEXT --evaluate_options.prompts no.jsonl", "--evaluate_options.prompts no.jsonl", 1),
    ("--evaluate TEXT --evaluate_options.reference ./no", "--evaluate_options.reference ./no: there is no such", 1),
    ("--export nope", "--export nope is not supported", 2),
    (
        "--export mlx --export_options.approximate adapter",
        "--export_options.approximate adapter: mlx takes none",
        2,
    ),
    ("--export mlx --export_options.text no.txt", "--export_options.text no.txt: there is no such file", 1),
    ("--export mlx --export_options.float_model no/such/folder", "requantize", 2),
    ("--export onnx", "onnx: an adapter is not written beside the model. Merge the adapter first", 1),
    ("--export onnx --merge keep", "onnx: a low-rank branch, which a merge with", 1),
    ("--export gptq --merge auto", "gptq cannot hold this model", 1),
    ("--export mlx --merge dense", "the model has no quantized layers", 1),
    ("--export mlx --merge dense --adapter ADAPTER", "the model has no quantized layers", 1),
    ("--export gguf --merge auto", "no converter here", 1),
    ("--merge auto --export mlx --export_output OUT/merged", "--merged_output and --export_output are one folder", 2),
    ("--merge auto --merged_output FULL", "FULL is not empty", 1),
    ("--export mlx --export_output FULL", "FULL is not empty", 1),
    ("--merge auto --fsdp_size 2", "--merge needs the whole base in one process", 2),
    ("--evaluate TEXT --fsdp_size 2", "--evaluate needs the whole base in one process", 2),
    ("--export mlx --fsdp_size 2", "--export needs the whole base in one process", 2),
]


@pytest.mark.parametrize(("options", "said", "code"), REFUSED, ids=[each[0] for each in REFUSED])
def test_what_cannot_be_done_at_the_end_is_refused_before_the_first_step(
    options, said, code, commands, adapter, text_file, tmp_path, capsys, monkeypatch
):
    def no_converter(self):
        raise ImportError("no converter here.")

    monkeypatch.setattr(train, "trained", None)
    monkeypatch.setattr(GgufFormat, "check_installation", no_converter)
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "mine.txt").write_text("mine")
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "few words"}))
    named = {
        "OUT": tmp_path / "out",
        "TEXT": text_file,
        "FULL": tmp_path / "FULL",
        "SHORT": tmp_path / "short.jsonl",
        "ADAPTER": adapter,
    }
    words = options.split()
    for name, place in named.items():
        words = [word.replace(name, str(place)) for word in words]
    assert said in refused_untouched(capsys, [*commands["train"], *words], tmp_path, code).replace(
        str(tmp_path / "FULL"), "FULL"
    )


def test_a_float_model_is_not_quantized_for_an_end_that_cannot_be(float_model, commands, tmp_path, capsys):
    command = ["train", float_model, *commands["train"][2:], "--quantization.group_size", "32"]
    for options, said, code in (
        (["--merge", "append"], "hqq weights cannot be extended", 2),
        (["--merge", "calibrated", "--data", str(tmp_path / "short.jsonl")], "calibration.data FILE", 1),
        (["--export", "onnx"], "an adapter is not written", 1),
    ):
        (tmp_path / "short.jsonl").write_text(json.dumps({"text": "few words"}))
        assert said in refused_untouched(capsys, [*command, *options], tmp_path, code)


def fails(*_, **__):
    raise ValueError("no more")


@pytest.mark.parametrize("verb", ["merge", "evaluate", "export"])
def test_an_end_that_fails_says_what_goes_on_and_is_taken_up_there(
    verb, quantized, text_file, tmp_path, capsys, monkeypatch
):
    out, verbs = tmp_path / "out", ["merge", "evaluate", "export"]
    command = [*with_end(tmp_path, quantized, text_file), "--output", str(out)]
    module, name = {"merge": (merge, "saved_model"), "evaluate": (evaluate, "measured"), "export": (export, "export")}[
        verb
    ]
    with monkeypatch.context() as patched:
        patched.setattr(module, name, fails)
        said = refused(capsys, command, 1)
    assert f"no more. The adapter is complete, in {out}: go on with --training.resume_from_checkpoint true" in said
    for each in verbs:
        assert (f"peft-quantlayers {each} {out}" in said) == (verbs.index(each) >= verbs.index(verb)), each
    before = contents(out)
    text = printed(capsys, [*command, *RESUMED])
    assert "all 2 steps had been trained" in text
    after = contents(out)
    for each, place in (("merge", "merged"), ("evaluate", "evaluation.json"), ("export", "exported")):
        is_done = verbs.index(each) < verbs.index(verb)
        assert (f"{each}: {out / place} had been written" in text) == is_done
        assert any(path.startswith(place) for path in before) == is_done
        assert any(path.startswith(place) for path in after)


def test_without_a_checkpoint_the_commands_by_hand_are_all_that_goes_on(
    quantized, text_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(export, "export", fails)
    command = with_end(tmp_path, quantized, text_file, merge="auto", evaluate=None, evaluate_options={})
    out = tmp_path / "out"
    said = refused(capsys, [*command, "--output", str(out), "--training.save_strategy", "no"], 1)
    assert f"The adapter is complete, in {out}: go on by hand: peft-quantlayers export {out}/merged" in said


def test_what_was_done_of_another_adapter_or_by_other_options_is_done_again(quantized, text_file, tmp_path, capsys):
    out = tmp_path / "out"
    command = [*with_end(tmp_path, quantized, text_file), "--output", str(out), *RESUMED]
    printed(capsys, command)
    first = contents(out / "merged")
    assert "had been written" in printed(capsys, command)
    assert contents(out / "merged") == first
    assert "had been written" not in printed(capsys, [*command, "--training.max_steps", "4"])
    second = contents(out / "merged")
    assert second["model.safetensors"] != first["model.safetensors"]
    text = printed(capsys, [*command, "--training.max_steps", "4", "--export_options.dtype", "float16"][:-2])
    assert text.count("had been written") == 3
    text = printed(capsys, [*command, "--training.max_steps", "4", "--merge", "requantize"])
    assert "had been written" not in text


def test_a_run_that_is_resumed_does_not_write_over_the_model_of_another(quantized, text_file, tmp_path, capsys):
    mine = tmp_path / "mine"
    command = [*with_end(tmp_path, quantized, text_file), "--output", str(tmp_path / "out"), *RESUMED]
    command += ["--merged_output", str(mine)]
    mine.mkdir()
    (mine / "config.json").write_text("{}")
    assert "mine is not empty" in refused_untouched(capsys, command, tmp_path)
    os.remove(mine / "config.json")
    printed(capsys, command)
    printed(capsys, command)  # its own


def test_a_folder_of_an_adapter_may_be_the_reference(quantized, adapter, text_file, capsys):
    measured = ["--text", text_file, "--n_tokens", "256", "--window", "64", "--json"]
    same = json.loads(printed(capsys, ["evaluate", adapter, "--reference", adapter, *measured]))
    assert same["kl"] == pytest.approx(0.0, abs=1e-6)
    other = json.loads(printed(capsys, ["evaluate", quantized, "--reference", adapter, *measured]))
    assert other["reference_perplexity"] == same["perplexity"]
    assert other["kl"] > 0


def test_a_base_on_the_hub(quantized, tmp_path, capsys, monkeypatch):
    put_in_hub(tmp_path / "hub", Path(quantized), "organization/base")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    command = with_settings(tmp_path, ROWS, model="organization/base", training=STEPS, export="mlx")
    command += ["--output", str(tmp_path / "out")]
    assert "organization/base is no folder: export reads local folders" in refused(capsys, command, 1)
    printed(capsys, [*command, "--merge", "auto"])
    assert (tmp_path / "out" / "exported" / "export.yaml").is_file()


def test_names_that_other_trainers_have_for_the_export(commands, tmp_path, capsys):
    command = [*commands["train"], "--export", "mlx", "--export_dir", str(tmp_path / "served"), "--dry_run"]
    assert f"peft-quantlayers export {tmp_path / 'out'} {tmp_path / 'served'} --format mlx" in printed(capsys, command)
    assert main([*commands["merge"][:2], "--export_dir", str(tmp_path / "merged"), "--dry_run"]) == 0


def test_a_command_with_long_values_is_one_line(commands, capsys):
    prompts = json.dumps([f"What is red, and what is the number {number}?" for number in range(8)])
    command = [*commands["train"], "--dry_run", "--json", "--evaluate", "true", "--evaluate_options.prompts", prompts]
    (then,) = json.loads(printed(capsys, command))["then"]
    assert "number 7?" in then
    assert "\n" not in then
