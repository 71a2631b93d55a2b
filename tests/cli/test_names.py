"""Options in YAML files under other programs' names, wherever on the line the file is named."""

import re
from pathlib import Path

import pytest
import yaml

from peft_quantlayers.cli import main
from quantlayers_cli.option_names import WrongUsage, with_names

KNOWN = {"model", "output", "nbits", "group_size"}
LINES = [
    ["FILE", "--model", "M", "--output", "O"],
    ["M", "O", "--config", "FILE"],
    ["M", "O", "--config=FILE"],
    ["--model", "M", "--config", "FILE", "--output", "O"],
]


def test_an_adapter_that_is_given_stands_for_its_model(tmp_path):
    known, places = {"model", "output", "adapter"}, ["model", "output"]
    (tmp_path / "c.yaml").write_text("lora_model_dir: A\n")
    for line in (["O", "--adapter", "A"], [str(tmp_path / "c.yaml"), "O"]):
        named = with_names(line, places, known, ["output"])
        assert named[named.index("O") - 1] == "--output", line
    assert with_names(["M", "O", "--adapter", "A"], places, known)[:4] == ["--model", "M", "--output", "O"]
    assert with_names(["M", "--adapter", "A", "--output", "O"], places, known)[:2] == ["--model", "M"]


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_an_alias_in_a_file_is_renamed_in_its_own_place(line, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("bits: 4\n")
    given = [argument.replace("FILE", str(file)) for argument in line]
    found = with_names(given, ["model", "output"], KNOWN, ["model", "output"])
    found = [part for argument in found for part in (argument.split("=", 1) if "=" in argument else [argument])]
    options = dict(zip(found[::2], found[1::2], strict=True))
    assert (options["--model"], options["--output"]) == ("M", "O")
    assert yaml.safe_load(options["--config"]) == {"nbits": 4}


def test_two_files_keep_their_contents(tmp_path):
    files = []
    for name, line in (("one", "bits: 4"), ("two", "base_model: M")):
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(f"{line}\n")
    with_both = ["M", "O", "--config", str(files[0]), "--config", str(files[1])]
    found = with_names(with_both, ["model", "output"], KNOWN)
    contents = [found[place + 1] for place, argument in enumerate(found) if argument == "--config"]
    assert yaml.safe_load(contents[0]) == {"nbits": 4}
    assert yaml.safe_load(contents[1]) == {"model": "M"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nbits: 4\nnbits: 3\n", "'nbits' is in line 1 and in line 2. Leave one of them"),
        ("nbits: 4\nbits: 3\n", "'nbits' and 'bits' are the same option"),
        ("group:\n  a: 1\n  a: 2\n", "'a' is in line 2 and in line 3"),
        ("group: 5\n", "group holds options, one per line below it (name: value); it holds 5"),
        ("group: [a]\n", "group holds options"),
        ("- nbits\n", "it holds a list"),
        ("# nothing\n", "it holds nothing"),
        ("nbits: *no\n", "is no YAML"),
        ("group:\n\ta: 1\n", "is no YAML"),
        ("nbits: " + "[" * 5000, "is no YAML"),
        ("? [a]\n: 1\n", "is no YAML"),
        ("4: nbits\n", "unknown key '4'"),
    ],
)
def test_a_file_that_holds_no_options_is_refused_by_its_name(text, said, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(WrongUsage, match=re.escape(str(file))) as refused:
        with_names([str(file)], ["model", "output"], {*KNOWN, "group.a", "group.b"})
    assert said in str(refused.value)


def test_a_group_with_nothing_in_it_is_nothing(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("nbits: 4\ngroup:\n")
    found = with_names([str(file)], ["model", "output"], {*KNOWN, "group.a"})
    assert yaml.safe_load(found[found.index("--config") + 1]) == {"nbits": 4}


def test_flags_and_choices_of_a_file_or_the_line(float_model, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("overwrite: maybe\n")
    for options, said in (
        (["--config", str(tmp_path / "c.yaml")], "overwrite='maybe': expected true or false"),
        (["--overwrite", "maybe"], "overwrite='maybe': expected true or false"),
        (["--method", "gptq"], "method='gptq': choose one of aqlm, hqq, nf4"),
        (["--dtype", "float8"], "dtype='float8': choose one of auto, float32"),
        (["--transforms", "[nope]"], "transforms='nope': choose one of awq_scales"),
        (["--tokenizer", ""], "--tokenizer is empty"),
    ):
        assert main(["quantize", float_model, str(tmp_path / "out"), *options]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "is_json"),
    [([], False), (["--json"], True), (["--json", "true"], True), (["--json=false"], False), (["--json", "2"], None)],
)
def test_a_flag_may_have_a_value_which_wins_over_the_file(given, is_json, quantized, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(f"json: {str(not is_json).lower()}\n" if given else "debug: false\n")
    code = main(["inspect", str(tmp_path / "c.yaml"), "--model", quantized, *given])
    if is_json is None:
        assert code == 2
        assert "expected true or false" in capsys.readouterr().err
    else:
        assert code == 0
        assert capsys.readouterr().out.startswith("{") == is_json


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("save_strategy: no", {"training": {"save_strategy": "no"}}),
        ("training: {eval_strategy: off, bf16: false}", {"training": {"eval_strategy": "no", "bf16": False}}),
        ("training:\n  resume_from_checkpoint: true", {"training": {"resume_from_checkpoint": "true"}}),
        ("resume_from_checkpoint: false\nmerge: no", {"training": {"resume_from_checkpoint": None}, "merge": None}),
    ],
)
def test_words_that_yaml_takes_for_true_and_false_are_read_as_they_are_meant(text, read, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    names = {"bf16", "eval_strategy", "resume_from_checkpoint", "save_strategy"}
    known = {"merge", *(f"training.{name}" for name in names)}
    _, content = with_names([str(tmp_path / "c.yaml")], ["model"], known)
    given = yaml.safe_load(Path(content).read_text() if content.endswith(".yaml") else content)
    assert given == read


TRAIN = {"model", "output", "data", "quantization.nbits", "lora", "lora.r", "training", "training.max_steps"}


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        (["--bits", "4"], ["--quantization.nbits", "4"]),
        (["--quantization_bit=4"], ["--quantization.nbits=4"]),
        (["--max-steps", "3"], ["--training.max_steps", "3"]),
        (["--learning_rate", "1e-4"], ["--training.learning_rate", "1e-4"]),  # a field that the file does not list
        (["--micro_batch_size", "2"], ["--training.per_device_train_batch_size", "2"]),
        (["--lora_rank", "8"], ["--lora.r", "8"]),
        (["--dataset", "rows.jsonl"], ["--data", "rows.jsonl"]),
    ],
)
def test_names_of_other_trainers_are_ours(given, ours):
    known = TRAIN - {"lora.r", "training.max_steps"}  # as the listed options have it: groups of others without fields
    for names in (TRAIN | {"training.learning_rate", "training.per_device_train_batch_size"}, known):
        assert with_names(given, ["model", "output"], names) == ours


def test_fields_without_their_group_stand_in_a_file_beside_the_group(tmp_path):
    (tmp_path / "c.yaml").write_text("training:\n  seed: 1\nmax_steps: 3\nlr: 0.1\n")
    fields = {"training.seed", "training.learning_rate"}
    found = with_names([str(tmp_path / "c.yaml")], ["model"], TRAIN - {"training"} | fields)
    assert yaml.safe_load(found[1]) == {"training": {"seed": 1, "max_steps": 3, "learning_rate": 0.1}}
    (tmp_path / "c.yaml").write_text("max_step: 3\n")
    with pytest.raises(WrongUsage, match="unknown key 'max_step' \\(did you mean 'max_steps'"):
        with_names([str(tmp_path / "c.yaml")], ["model"], TRAIN - {"training"} | fields)
    with pytest.raises(WrongUsage, match="there is no option --max_steps"):
        with_names(["--max_steps", "3"], ["model"], KNOWN)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (["O"], {"--output": "O"}),
        (["M", "O"], {"--model": "M", "--output": "O"}),
        (["M", "--output", "O"], {"--model": "M", "--output": "O"}),
    ],
)
def test_positionals_fill_in_what_a_file_leaves_open(line, named, tmp_path):
    (tmp_path / "c.yaml").write_text("model: of-the-file\n")
    found = with_names([str(tmp_path / "c.yaml"), *line], ["model", "output"], KNOWN, ["model", "output"])[2:]
    assert dict(zip(found[::2], found[1::2], strict=True)) == named
