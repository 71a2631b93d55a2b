"""``peft-quantlayers run``: other programs run as without it, and load our models, in the processes they start too."""

import json
import os
import re
import socket
import subprocess
import sys
import tomllib
import urllib.request
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from _tiny_models import tiny_model

import peft_quantlayers as pql
from peft_quantlayers import cli
from quantlayers_cli import run as run_module

ROOT = Path(__file__).parents[2]
PROGRAMS = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

# A program that knows nothing of ours, and starts another one that does not either.
PROGRAM = """
import json, subprocess, sys
import neighbour
CHILD = (
    "import sys; before = 'torch' in sys.modules\\n"
    "import peft\\n"  # which imports transformers on its way: ours has to wait until peft is there
    "from transformers import AutoModelForCausalLM\\n"
    "print(before, type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj).__name__)"
)
if __name__ == "__main__":
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    child = subprocess.run([sys.executable, "-c", CHILD, sys.argv[1]], capture_output=True, text=True)
    print(json.dumps({
        "layer": type(model.model.layers[0].mlp.up_proj).__name__, "arguments": sys.argv, "neighbour": neighbour.NAME,
        "main": sys.modules["__main__"].__file__, "child": child.stdout.strip(), "error": child.stderr[-2000:],
    }))
    sys.exit(7)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    config = pql.HQQConfig(nbits=4, group_size=16)
    pql.save_model(pql.quantize_model(tiny_model("LlamaForCausalLM"), config, progress=False), path / "m")
    (path / "program.py").write_text(PROGRAM)
    (path / "neighbour.py").write_text("NAME = 'beside the script'")
    return path


def command(*arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, "-m", "peft_quantlayers", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"} | environment,
    )


def test_a_script_and_the_processes_that_it_starts_load_a_saved_model(folder):
    # The variable keeps an import from registering; run registers all the same.
    done = command("run", folder / "program.py", folder / "m", "--flag", PEFT_QUANTLAYERS_NO_REGISTER="1")
    assert done.returncode == 7, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["layer"] == "HQQLinear"
    assert told["arguments"] == [str(folder / "program.py"), str(folder / "m"), "--flag"]
    assert told["main"] == str(folder / "program.py")
    assert told["neighbour"] == "beside the script"
    assert told["child"] == "False HQQLinear", told["error"]


def test_autoload_in_the_environment_is_enough_and_hides_no_other_sitecustomize(folder):
    own = folder / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("import sys; sys.was_here = True")
    path = os.pathsep.join([run_module.AUTOLOAD_FOLDER, str(own), str(ROOT), str(ROOT / "kernels")])
    program = (
        "import sys; assert sys.was_here; assert 'transformers' not in sys.modules\n"
        "import transformers; assert 'peft_quantlayers' in sys.modules\n"
        f"print(type(transformers.AutoModelForCausalLM.from_pretrained({str(folder / 'm')!r}).lm_head))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr


def in_process(monkeypatch, capsys, *arguments):
    """Exit code and output of ``run`` in this process, whose settings are put back."""
    monkeypatch.setattr(sys, "argv", ["peft-quantlayers"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    code = cli.main(["run", *map(str, arguments)])
    output = capsys.readouterr()
    return code, output.out, output.err


# Orders of imports that programs have: a look whether transformers is there; a module of it first, which imports peft.
ORDERS = {
    "a module first": "from transformers.trainer_utils import IntervalStrategy",
    "looked for, then lazily": (
        "from importlib.util import find_spec; find_spec('transformers')\nfrom transformers import TrainingArguments"
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_autoload_imports_the_package_in_whatever_order_a_program_imports(order, folder):
    (folder / "order.py").write_text(f"{ORDERS[order]}\nimport sys\nprint('peft_quantlayers' in sys.modules)")
    path = os.pathsep.join([run_module.AUTOLOAD_FOLDER, str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, folder / "order.py"], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.stdout.split() == ["True"], done.stderr
    assert "could not be imported" not in done.stderr


def test_a_module_runs_as_with_dash_m(monkeypatch, capsys, tmp_path):
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "a_module.py").write_text("import sys; print(__name__, sys.argv[1:])")
    monkeypatch.chdir(tmp_path)
    assert in_process(monkeypatch, capsys, "-m", "a_package.a_module", "-m", "x")[:2] == (0, "__main__ ['-m', 'x']\n")
    assert os.environ["PYTHONPATH"] == os.pathsep.join([run_module.AUTOLOAD_FOLDER, "/somewhere"])


@pytest.mark.parametrize("prefix", [(), ("--",), ("python",), ("--", "python3")])
def test_a_command_of_the_environment_runs_in_this_process(prefix, monkeypatch, capsys):
    entry = EntryPoint("a-command", f"{__name__}:a_command", "console_scripts")
    monkeypatch.setattr(run_module, "entry_points", lambda group: [entry])
    assert in_process(monkeypatch, capsys, *prefix, "a-command", "--help")[:2] == (3, f"{os.getpid()} ['--help']\n")


def a_command():
    print(os.getpid(), sys.argv[1:])
    return 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), r"which program\? Give a command"),
        (("--flag",), "'--flag' is no program.*--help"),
        (("-m",), "name of a module"),
        (("-m", "no_such.module"), "there is no module no_such.module"),
        (("missing/script.py",), "there is no file missing/script.py"),
        (("accelerat", "launch"), "no command 'accelerat'.*'accelerate'"),
    ],
)
def test_what_is_no_program_is_told_and_exits_with_2(arguments, message, monkeypatch, capsys):
    code, out, error = in_process(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert re.search(message, error)


def test_help_says_what_run_does_and_autoload_prints_a_folder(capsys):
    assert cli.main(["run", "--help"]) == 0
    assert "accelerate launch" in capsys.readouterr().out
    assert cli.main(["autoload"]) == 0
    assert (Path(capsys.readouterr().out.strip()) / "sitecustomize.py").is_file()
    assert cli.main(["runn"]) == 2


# Of TRL's commands a row of the data, the first loss where it is known, and the most that the last one may be of it.
OF_TRL = {
    "sft": ({"prompt": "The lamp is", "completion": " red."}, None, 0.95),
    "dpo": ({"prompt": "The lamp is", "chosen": " red.", "rejected": " a fish."}, 0.6931, 0.87),
}


@pytest.mark.parametrize("program", OF_TRL)
def test_trls_commands_train_on_a_saved_model(program, tmp_path):
    pytest.importorskip("trl", reason="the extra `train` is not installed")
    row, first_loss, most = OF_TRL[program]
    quantized_folder(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 16)
    done = command(
        *("run", "trl", program, "--model_name_or_path", "m", "--dataset_name", "data", "--output_dir", "out"),
        *("--use_peft", "--lora_target_modules", "all-linear", "--lora_r", "4", "--learning_rate", "3e-3"),
        *("--max_steps", "4", "--logging_steps", "1", "--report_to", "none", "--use_cpu", "--bf16", "false"),
        cwd=tmp_path,
        PATH=PROGRAMS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    losses = [each["loss"] for each in state["log_history"] if "loss" in each]
    assert first_loss is None or losses[0] == pytest.approx(first_loss, abs=1e-3)
    assert losses[-1] < most * losses[0]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_transformers_serves_a_saved_model_and_chats_with_it(tmp_path):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="pip install 'transformers[serving]'")
    model = quantized_folder(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}", "PATH": PROGRAMS}
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "peft_quantlayers", "run", "transformers", "serve", str(model)),
            *("--port", port, "--device", "cpu"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        lines = []
        for line in server.stderr:
            lines.append(line)
            if "running on" in line:
                break
        assert server.poll() is None, "".join(lines)
        asked = {"model": str(model), "messages": [{"role": "user", "content": "The lamp is"}], "max_tokens": 8}
        request = urllib.request.Request(
            f"http://localhost:{port}/v1/chat/completions",
            json.dumps(asked).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=100) as answered:
            served = json.load(answered)["choices"][0]["message"]["content"]
        chatted = subprocess.run(
            [
                *(sys.executable, "-m", "peft_quantlayers", "run", "transformers", "chat", str(model)),
                *(f"http://localhost:{port}", "max_new_tokens=8", "do_sample=False"),
            ],
            input="The lamp is\nn\n!exit\n",  # "n": no more tokens
            capture_output=True,
            text=True,
            timeout=200,
            env=os.environ | environment | {"HF_HUB_OFFLINE": "0"},
            cwd=tmp_path,
        )
    finally:
        server.kill()
        server.communicate()
    ours = command("chat", model, "--prompt", "The lamp is", "--max_new_tokens", "8", "--json")
    assert json.loads(ours.stdout)["messages"][-1]["content"] == served
    assert chatted.returncode == 0, chatted.stderr[-3000:]
    assert "8 tokens in" in chatted.stdout


def quantized_folder(folder: Path) -> Path:
    from tiny_folder import byte_tokenizer, save_tiny_llama

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    save_tiny_llama(folder / "float", tokenizer)
    return pql.quantize_checkpoint(folder / "float", folder / "m", pql.HQQConfig(group_size=32), progress=False)


def test_the_commands_that_are_installed_are_there():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == {"peft-quantlayers", "pql"}
    assert all(EntryPoint(name, value, "console_scripts").load() is cli.main for name, value in scripts.items())
