"""``evaluate --tasks`` and lm-eval's own command, on a task in a folder: nothing is fetched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import printed, refused

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[evaluate]'")

ROOT = Path(__file__).parents[2]
TASK = """
task: places
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


@pytest.fixture
def tasks(tmp_path) -> str:
    rows = [{"question": "The lamp is", "choices": [" red", " a fish"], "answer": number % 2} for number in range(6)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "places.yaml").write_text(TASK.replace("ROWS", str(tmp_path / "questions.jsonl")))
    return str(tmp_path / "tasks")


def test_evaluate_scores_tasks_by_name_or_list(quantized, tasks, capsys):
    command = ["evaluate", quantized, "--include_path", tasks, "--json", "--tasks"]
    found = json.loads(printed(capsys, [*command, "places"]))
    assert found["tasks"]["places"]["acc,none"] == 0.5  # one answer or the other, whatever the question
    assert json.loads(printed(capsys, [*command, "[places]", "--limit", "1"]))["tasks"]["places"]["acc,none"] in (0, 1)
    assert "did you mean 'places'?" in refused(capsys, [*command, "plces"], 1)


def test_train_scores_tasks_at_the_end_and_knows_their_names_before(commands, tasks, tmp_path, capsys):
    options = ["--evaluate", "true", "--evaluate_options.include_path", tasks, "--evaluate_options.tasks"]
    said = refused(capsys, [*commands["train"], *options, "plces"], 1)
    assert "--evaluate_options.tasks plces: lm-eval has no such task (did you mean 'places'?)" in said
    assert not (tmp_path / "out").exists()
    printed(capsys, [*commands["train"], *options, "places"])
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["tasks"]["places"]["acc,none"] == 0.5
    assert "perplexity" not in found


def test_lm_evals_own_command_loads_our_model(quantized, tasks):
    model = f"pretrained={quantized}"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "peft_quantlayers", "run", "lm_eval", "--model", "hf", "--model_args", model),
            *("--device", "cpu", "--tasks", "places", "--include_path", tasks),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|places|" in done.stdout.replace(" ", "")
