"""What the command line answers before it imports torch: help, wrong verbs, wrong names."""

import json
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import cli_page
import pytest

from quantlayers_cli import main
from quantlayers_cli import options as listed_options
from quantlayers_cli.main import VERBS, WITHOUT_OPTIONS
from quantlayers_cli.option_names import WrongUsage

ROOT = Path(__file__).parents[2]
# Calls the command line, and says which packages that has imported.
PROGRAM = """
import json, sys
from quantlayers_cli import main
codes = [main(arguments) for arguments in json.loads(sys.argv[1])]
roots = {name.partition(".")[0] for name in sys.modules}
print(json.dumps([codes, sorted(roots)]))
"""


def test_help_and_wrong_names_import_none_of_the_packages_that_do_the_work(tmp_path):
    (tmp_path / "wrong.yaml").write_text("model: m\noutput: o\nnbit: 3\n")
    helps = [["--help"], ["--version"], ["autoload"], *([verb, "--help"] for verb in VERBS)]
    wrong = [
        ["quantise"],
        ["quantize"],
        ["quantize", "m", "o", "--nbit", "3"],
        ["quantize", "wrong.yaml"],
        ["quantize", "missing.yaml"],
        ["train", "m", "o", "--datta", "d"],
        ["run", "no-such-command"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([*helps, *wrong])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )
    assert done.returncode == 0, done.stderr
    codes, imported = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0] * len(helps) + [2] * len(wrong)
    assert not {"torch", "numpy", "transformers", "peft", "trl", "jsonargparse", "peft_quantlayers"} & set(imported)
    assert len(done.stderr.splitlines()) == len(wrong)


def test_the_listed_options_are_those_that_are_declared():
    assert cli_page.OPTIONS.read_text() == cli_page.declared(), "run: python benchmarks/cli_page.py"


def test_the_reference_page_is_what_the_options_say():
    assert cli_page.PAGE.read_text() == cli_page.page(), "run: python benchmarks/cli_page.py"


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - set(WITHOUT_OPTIONS)))
def test_help_says_what_every_option_is_in_lines_that_fit_the_terminal(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([verb, "x", "--help"]) == 0
    text = capsys.readouterr().out
    listed = json.loads(cli_page.OPTIONS.read_text())[verb]
    for name in map(listed_options.option_name, listed["options"]):
        found = re.search(rf"^  --{re.escape(name)}\b[^\n]*?(?:  |\n +)(\S.*)", text, re.M)
        assert found, name
        assert not found[1].startswith("(type"), name
    described = text[: text.index("exit codes")].splitlines()
    assert max(len(line) for line in described if not line.startswith("  -")) <= 80
    assert ("--help_all" in text) == (verb == "train")


@pytest.mark.parametrize("option", ["--lora.r", "--lora_r", "--training.max_steps"])
def test_fields_of_other_packages_are_left_to_the_full_parser(option):
    listed_options.check_names("train", ["m", "o", "--data", "d", option, "3"])


def test_methods_of_other_packages_bring_options_that_are_not_listed(monkeypatch):
    with pytest.raises(WrongUsage, match="no option --percentile"):
        listed_options.check_names("quantize", ["m", "o", "--percentile", "3"])
    entry = EntryPoint("absmax8", "my_package:Absmax", listed_options.METHODS_OF_OTHERS)
    monkeypatch.setattr(listed_options, "entry_points", lambda group: [entry])
    listed_options.check_names("quantize", ["m", "o", "--percentile", "3"])


def test_all_options_of_train_are_those_of_the_installed_packages(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help_all"])
    text = capsys.readouterr().out
    assert "--lora.r " in text
    assert "--training.max_steps " in text


def test_a_reader_that_has_enough_is_no_error():
    started = subprocess.Popen(
        [sys.executable, "-c", "import sys; from quantlayers_cli import main; sys.exit(main(['train', '--help']))"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert started.stdout is not None
    started.stdout.close()
    assert started.communicate(timeout=60)[1] == b""


IN_PYTHON = "import sys; from quantlayers_cli import main; sys.exit(main())"


@pytest.mark.parametrize("program", [["-m", "peft_quantlayers"], ["-c", IN_PYTHON]], ids=["module", "script"])
def test_an_error_after_all_imports_is_the_only_line(program):
    command = [sys.executable, *program, "inspect", "no-such-folder"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
