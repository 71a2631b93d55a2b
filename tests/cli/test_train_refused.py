"""A training that cannot work: refused before anything is written where that can be known, and else undone."""

import json
import os
from pathlib import Path

import pytest
from commands import printed, refused
from test_wrong_places import contents, refused_untouched
from tiny_folder import byte_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration, Trainer

from peft_quantlayers.cli.verbs import train

# Options, and a part of what is said; a quarter of a second each, since no model is loaded.
BEFORE_LOADING = [
    ("--training.per_device_train_batch_size 0", "batch_size 0 must be at least 1"),
    ("--training.per_device_train_batch_size -3", "batch_size -3 must be at least 1"),
    ("--training.per_device_eval_batch_size 0", "eval_batch_size 0 must be at least 1"),
    ("--training.gradient_accumulation_steps 0", "accumulation_steps 0 must be at least 1"),
    ("--training.dataloader_num_workers -1", "num_workers -1 must be at least 0"),
    ("--training.max_length 0", "max_length 0 must be at least 2"),
    ("--training.learning_rate -1", "learning_rate -1 must be at least 0"),
    ("--training.neftune_noise_alpha -1", "neftune_noise_alpha -1 must be at least 0"),
    ("--training.save_steps 0", "save_steps 0 must be above 0"),
    ("--training.max_steps 0", "max_steps 0 trains nothing"),
    ("--training.max_steps -1 --training.num_train_epochs 0", "num_train_epochs 0 must be above 0"),
    ("--training.report_to wandb", "report_to wandb: the package is not installed"),
    ("--training.report_to nonesuch", "nonesuch is not supported"),
    ("--lora.task_type SEQ_CLS", "task_type SEQ_CLS: train finetunes language models"),
    ("--lora.target_modules ((", "'((' is no regular expression"),
    ("--merge exact", "--merge exact needs an adapter that is constant in each group"),
    ("--merge auto --merged_output OUT", "--output and --merged_output are one folder"),
    ("--merged_output OUT2", "--merged_output is for --merge STRATEGY"),
    ("--adapter_type scales --merge_aware true", "--merge_aware true is for LoRA"),
    ("--fsdp_size 2", "must lie between 1 and the number of processes"),
]


@pytest.mark.parametrize(("options", "said"), BEFORE_LOADING, ids=[options for options, _ in BEFORE_LOADING])
def test_options_that_cannot_work_are_refused_before_the_model_is_loaded(
    options, said, commands, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train, "load_model", None)
    monkeypatch.setattr("peft_quantlayers.cli.training_checks.get_available_reporting_integrations", lambda: [])
    exit_code = 1 if "not installed" in said else 2
    options = options.replace("OUT", str(tmp_path / "out"))
    assert said in refused_untouched(capsys, [*commands["train"], *options.split()], tmp_path, exit_code)


# Options, a part of what is said, and whether it shows without a step: then a float model is not quantized first.
BY_THE_TRAINER = [
    ("--training.optim no_such", "no_such is not a valid OptimizerNames", True),
    ("--training.optim_args nope", "--training.optim_args nope", True),
    ("--training.lr_scheduler_type no_such", "no_such is not a valid SchedulerType", True),
    ("--training.lr_scheduler_type cosine_with_min_lr", "min_lr", True),
    ("--training.eval_strategy steps", "eval_dataset", True),
    ("--training.load_best_model_at_end true", "save and eval strategy", True),
    ("--training.packing true --training.packing_strategy nope", "Invalid packing strategy", True),
    ("--training.gradient_checkpointing_kwargs {nope:\u00a01}", "nope", False),
    ("--lora.modules_to_save [nope]", "modules_to_save nope: the model has no such module", False),
]


@pytest.mark.parametrize(("options", "said", "is_early"), BY_THE_TRAINER, ids=[each[0] for each in BY_THE_TRAINER])
def test_what_other_packages_refuse_leaves_nothing_behind(
    options, said, is_early, float_model, commands, tmp_path, capsys
):
    options, exit_code = [part.replace("\u00a0", " ") for part in options.split(" ")], 2 if is_early else 1
    assert said in refused_untouched(capsys, [*commands["train"], *options], tmp_path, exit_code)
    if is_early:
        of_float = ["train", float_model, *commands["train"][2:], *options]
        assert said in refused_untouched(capsys, of_float, tmp_path, exit_code)


def test_folders_above_the_output_go_too_and_what_was_there_stays(commands, tmp_path, capsys):
    wrong = ["--training.gradient_checkpointing_kwargs", "{nope: 1}"]
    (tmp_path / "old" / "sub").mkdir(parents=True)
    (tmp_path / "old" / "sub" / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for output, options in (("a/b/out", []), ("old", ["--overwrite"]), ("empty", [])):
        command = ["train", commands["train"][1], str(tmp_path / output), *commands["train"][3:], *options]
        assert refused_untouched(capsys, [*command, *wrong], tmp_path).endswith("Nothing was written.")


def test_a_base_that_was_quantized_is_kept_and_the_way_on_is_said(float_model, commands, tmp_path, capsys):
    command = ["train", float_model, *commands["train"][2:], "--training.max_steps", "1"]
    said = refused(capsys, [*command, "--training.gradient_checkpointing_kwargs", "{nope: 1}"], 1)
    out = tmp_path / "out"
    assert f"The quantized model in {out / 'base'} is kept: go on with --training.resume_from_checkpoint true" in said
    assert [path.name for path in out.iterdir()] == ["base"]
    before = contents(out / "base")
    printed(capsys, [*command, "--training.resume_from_checkpoint", "true"])
    assert contents(out / "base") == before


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_an_interrupt_while_the_first_checkpoint_or_the_adapter_is_saved(commands, tmp_path, capsys, monkeypatch):
    """Nothing half-made is left where no checkpoint is complete, and otherwise what was trained is."""
    out = tmp_path / "out"
    for name, options in (("_save_optimizer_and_scheduler", []), ("save_state", ["--training.save_strategy", "no"])):
        with monkeypatch.context() as patched:
            patched.setattr(Trainer, name, interrupted)
            before = contents(tmp_path)
            assert "interrupted" in refused(capsys, [*commands["train"], *options], 130)
        assert contents(tmp_path) == before, name
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "save_state", interrupted)
        said = refused(capsys, commands["train"], 130)
    assert "Checkpoints that are complete are kept: go on with --training.resume_from_checkpoint true" in said
    printed(capsys, [*commands["train"], "--training.resume_from_checkpoint", "true"])
    assert (out / "adapter_model.safetensors").is_file()


def test_too_little_memory_is_said_as_such(commands, tmp_path, capsys):
    said = refused_untouched(capsys, [*commands["train"], "--lora.r", str(10**11)], tmp_path)
    assert "there is not enough memory" in said
    assert "`peft-quantlayers estimate` says what a step takes" in said


def test_other_models(commands, tmp_path, capsys):
    tokenizer = byte_tokenizer()
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, **sizes)).save_pretrained(tmp_path / "short")
    config = T5Config(vocab_size=300, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "pair")
    for name, said in (("short", "cannot read 1024 tokens at once: it has 64 positions"), ("pair", "encoder-decoder")):
        tokenizer.save_pretrained(tmp_path / name)
        command = ["train", str(tmp_path / name), *commands["train"][2:], "--quantization.group_size", "16"]
        assert said in refused(capsys, command, 1)


RESUME = ["--training.resume_from_checkpoint", "true"]


def without_record(checkpoint: Path) -> None:
    """Make of ``checkpoint`` one of a version that kept no settings in it."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["stateful_callbacks"].pop("SettingsInState")
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))


def test_a_checkpoint_of_something_else(float_model, quantized, commands, tmp_path, capsys):
    printed(capsys, commands["train"])
    out, other = tmp_path / "out", str(tmp_path / "other")
    command = ["train", quantized, other, *commands["train"][3:], "--training.resume_from_checkpoint"]
    said = refused_untouched(capsys, [*command, str(out)], tmp_path)
    assert "is the output of a run, and no checkpoint" in said
    base = str(tmp_path / "base")
    printed(capsys, ["quantize", float_model, base, "--group_size", "64"])
    command = ["train", base, other, *commands["train"][3:], "--training.resume_from_checkpoint"]
    said = refused_untouched(capsys, [*command, str(out / "checkpoint-1")], tmp_path, 2)
    assert f"--model {quantized}, and now {base}" in said
    without_record(out / "checkpoint-1")
    said = refused_untouched(capsys, [*command, str(out / "checkpoint-1")], tmp_path)
    assert "was trained on" in said


# Options of the run that is resumed, and what is said of them.
OTHERS = [
    ("--training.learning_rate 0.5", "--training.learning_rate 2.0e-05, and now 0.5."),
    ("--training.per_device_train_batch_size 2", "--training.per_device_train_batch_size 8, and now 2."),
    ("--training.seed 1", "--training.seed 42, and now 1."),
    ("--training.packing true", "--training.packing false, and now true."),
    ("--training.lr_scheduler_type cosine", "--training.lr_scheduler_type linear, and now cosine."),
    ("--lora.lora_alpha 64 --lora.r 4", "--lora.r 8, and now 4; --lora.lora_alpha 8, and now 64."),
    ("--lora.target_modules [q_proj]", "--lora.target_modules all-linear, and now [q_proj]."),
    ("--adapter_type scales", "--adapter_type lora, and now scales."),
    ("--merge_aware true", "--merge_aware false, and now true."),
    ("--dtype bfloat16", "--dtype auto, and now bfloat16."),
]


def test_a_run_that_is_resumed_keeps_what_makes_its_result(commands, tmp_path, capsys, monkeypatch):
    printed(capsys, commands["train"])
    out, rows = tmp_path / "out", Path(commands["train"][4])
    with monkeypatch.context() as patched:
        patched.setattr(train, "load_model", None)
        for options, told in OTHERS:
            said = refused_untouched(capsys, [*commands["train"], *RESUME, *options.split()], tmp_path, 2)
            assert f"the run of {out / 'checkpoint-2'} had other settings: {told} Give the values" in said, said
        (tmp_path / "others.jsonl").write_text('{"text": "something else"}\n' * 8)
        for name, was in ((tmp_path / "others.jsonl", rows), (rows, f"{rows} with other content")):
            name.write_text((tmp_path / "others.jsonl").read_text())
            command = [*commands["train"], *RESUME, "--data", str(name)]
            said = refused_untouched(capsys, command, tmp_path, 2)
            assert f"had other settings: --data {was}, and now {name}. Give" in said
    # The way out that is said.
    assert f"--adapter {out / 'checkpoint-2'}, and another --output" in said
    further = [*commands["train"], "--adapter", str(out / "checkpoint-2"), "--output", str(tmp_path / "further")]
    printed(capsys, [*further, "--training.learning_rate", "0.5"])


def test_how_far_a_run_goes_and_what_is_told_of_it_may_change(commands, tmp_path, capsys):
    printed(capsys, commands["train"])
    rows = Path(commands["train"][4])
    moved = rows.rename(tmp_path / "moved.jsonl")
    others = {"max_steps": 3, "save_steps": 2, "logging_steps": 1, "dataloader_num_workers": 0, "run_name": "x"}
    others |= {"gradient_checkpointing": "false", "per_device_eval_batch_size": 1, "save_total_limit": 1}
    others["restore_callback_states_from_checkpoint"] = "true"
    options = [each for name, value in others.items() for each in (f"--training.{name}", str(value))]
    text = printed(capsys, [*commands["train"], *RESUME, *options, "--data", str(moved), "--eval_data", str(moved)])
    assert "trained 3 steps" in text
    # It is the resumed run's checkpoint now, which keeps them as well.
    command = [*commands["train"], *RESUME, "--data", str(moved), "--lora.r", "4"]
    assert "--lora.r 8, and now 4" in refused_untouched(capsys, command, tmp_path, 2)


@pytest.mark.parametrize("trainer", ["sft", "dpo"])
def test_the_settings_beside_the_output_and_the_command_are_one_run(trainer, commands, tmp_path, capsys):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "completion": "b"}\n' * 8)
    command = [*commands["train"], "--data", str(rows), "--trainer", trainer, "--lora.rank_pattern", "{q_proj: 2}"]
    printed(capsys, command)
    first = ["train", str(tmp_path / "out" / "train.yaml"), *RESUME, "--training.max_steps", "3"]
    assert "trained 3 steps" in printed(capsys, first)
    assert "trained 4 steps" in printed(capsys, [*command, *RESUME, "--training.max_steps", "4"])


def test_how_a_float_model_is_quantized_is_kept_too(float_model, commands, tmp_path, capsys):
    command = ["train", float_model, *commands["train"][2:]]
    printed(capsys, [*command, "--training.max_steps", "1"])
    command += RESUME
    said = refused_untouched(capsys, [*command, "--quantization.nbits", "3"], tmp_path, 2)
    assert "--quantization.nbits 4, and now 3." in said
    assert "trained 2 steps" in printed(capsys, [*command, "--quantization.nbits", "4"])  # the default, given


def test_a_checkpoint_without_settings_is_compared_by_its_adapter(commands, tmp_path, capsys):
    printed(capsys, commands["train"])
    checkpoint = tmp_path / "out" / "checkpoint-2"
    without_record(checkpoint)
    names = "[model.layers.0.mlp.down_proj, model.layers.0.mlp.gate_proj, ... (14 in all)]"
    for options, told in (
        ("--lora.r 4 --lora.lora_alpha 64", "--lora.r 8, and now 4; --lora.lora_alpha 8, and now 64."),
        ("--lora.target_modules [v_proj,q_proj]", f"--lora.target_modules {names}, and now [q_proj, v_proj]."),
        ("--lora.use_dora true", "--lora.use_dora false, and now true."),
        ("--adapter_type scales", "--adapter_type lora, and now scales."),
    ):
        for steps in ("2", "3"):
            command = [*commands["train"], *RESUME, *options.split(), "--training.max_steps", steps]
            said = refused_untouched(capsys, command, tmp_path, 2)
            assert f"the run of {checkpoint} had other settings: {told} Give the values" in said, said
    same = ["--lora.target_modules", "[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"]
    text = printed(capsys, [*commands["train"], *RESUME, *same, "--training.max_steps", "3", "--training.seed", "1"])
    assert "trained 3 steps" in text


# ---- rows

ROW = '{"text": "some words"}'
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
PAIR = '{"prompt": "a", "completion": "b"}'
ROWS = {
    "no JSON": ([ROW, ROW, '{"text": '], "line 3 is no JSON"),
    "no object": ([ROW, "5"], "line 2 holds 5"),
    "a number": ([ROW, "", ROW, '{"text": 5}'], "line 4: text is 5, and"),
    "null": ([ROW, '{"text": null}'], "line 2: text is null"),
    "another column": ([ROW, '{"other": "x"}'], "line 2: text is null"),
    "no words": (['{"text": " "}'] * 3, "holds no text: text is empty in all of 3 rows"),
    "no lines": (["", ""], "holds no rows"),
    "no template": ([CHAT, CHAT], "has no chat template"),
    "a chat of a word": ([CHAT, '{"messages": "hello"}'], "line 2: messages is 'hello'"),
    "a chat of nothing": ([CHAT, '{"messages": []}'], "line 2: messages is a chat without messages"),
    "no role": ([CHAT, '{"messages": [{"content": "a"}]}'], "and a message has role and content"),
    "no turn": ([CHAT, '{"messages": [{"who": "a", "says": "b"}]}'], "line 2: messages has the message"),
    "neither form": (['{"messages": [{"who": "a"}]}'], "a message has role and content, or from and value"),
    "no speaker": (['{"conversations": [{"from": null, "value": "b"}]}'], "and a message has from and value"),
    "no completion": ([PAIR, '{"prompt": "a"}'], "line 2: completion is null"),
    "no answer": (['{"instruction": "a", "output": null}'], "line 1: output is null"),
    "a large id": (['{"input_ids": [1, 999]}'], "line 1: input_ids holds [1, 999], and token ids are"),
    "a word for an id": (['{"input_ids": [1]}', '{"input_ids": [1, "x"]}'], "line 2: input_ids holds [1, 'x']"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_row_is_named_by_its_line(name, commands, tmp_path, capsys):
    lines, said = ROWS[name]
    rows = tmp_path / "wrong.jsonl"
    rows.write_text("\n".join(lines))
    command = [*commands["train"][:3], "--data", str(rows), *commands["train"][5:]]
    found = refused_untouched(capsys, command, tmp_path)
    assert f"--data {rows}" in found
    assert said in found


@pytest.mark.parametrize("option", ["--training.max_steps=1", "--show_batch"])
def test_rows_whose_completions_are_all_truncated(option, float_model, commands, tmp_path, capsys):
    rows = tmp_path / "long.jsonl"
    rows.write_text("\n".join(['{"prompt": "' + "a" * 90 + '", "completion": "b"}'] * 6))
    for model in (commands["train"][1], float_model):
        command = ["train", model, commands["train"][2], "--data", str(rows), option, "--training.max_length", "32"]
        said = refused_untouched(capsys, command, tmp_path)
        assert "in all of 6 rows the completion lies outside the first 32 tokens" in said
        assert said.count("--training.max_length") == 1


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": 5}', "line 2: text is 5"),
        ("x.jsonl", '{"text": "ö"}'.encode("latin-1"), "UTF-8"),
        ("x.json", b"[{", "cannot be read as .json"),
        ("x.csv", b'text\n"a,b\n', "cannot be read as .csv"),
        ("x.parquet", b"x", "cannot be read as .parquet"),
        ("x.arrow", b"x", "cannot be read as .arrow"),
        ("x.txt", b"\xff\xfe\x00", "is no text in UTF-8"),
        ("x.pdf", b"x", "a file of this kind is not read"),
        ("x/state.json", b"{}", "is no folder that datasets' save_to_disk wrote"),
    ],
)
def test_files_that_are_no_data_are_named_by_every_verb_that_takes_some(
    file, content, said, commands, tmp_path, capsys
):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(content)
    name = str(tmp_path / (os.path.dirname(file) or file))
    for verb, option in (("train", "--eval_data"), ("evaluate", "--text"), ("quantize", "--calibration.data")):
        found = refused_untouched(capsys, [*commands[verb], option, name], tmp_path)
        assert name in found
        assert said in found
