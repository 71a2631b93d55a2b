"""Benchmarks that take long, or that wait for a GPU, go through all their parts in small."""

import json
from pathlib import Path

from _models_rows import models_differences, models_left_out, models_rows, models_summary
from programs import run_program

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
BENCH_GPU = BENCHMARKS / "bench_gpu.py"
PARTS = {"copying", "decoding", "dequantizing", "training", "quantizing", "switch_points", "tile_sizes"}
PARTS |= {"decoding_slow_peers", "generating", "forms", "loading"}


def test_the_gpu_benchmark_runs_in_small_on_a_cpu(tmp_path):
    output = tmp_path / "gpu.json"
    done = run_program(BENCH_GPU, "--device", "cpu", "--tiny", "--no-tests", "--output", output)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(output.read_text())
    assert not result["failed"]
    assert not result["left_out"]
    assert set(result) >= PARTS
    assert all(result[part] for part in PARTS)


def test_the_models_table_has_a_row_for_each_class_and_goes_on_where_it_ended(tmp_path):
    output = tmp_path / "models.json"
    for pattern in ("LlamaForCausalLM", "GPT2LMHead*"):
        done = run_program(BENCHMARKS / "models_table.py", pattern, "--output", output)
        assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(output.read_text())
    assert [row["class"] for row in measured["rows"]] == ["GPT2LMHeadModel", "LlamaForCausalLM"]
    assert [cells[4:9] for cells in models_rows(measured)] == [["yes"] * 5] * 2
    assert models_differences(measured) == models_left_out(measured) == []
    assert "2 of these go all the way" in models_summary(measured)


def test_a_difference_is_shown_in_its_row_and_in_words():
    row = {"class": "A", "float": "", "in memory": "", "while loading": "", "saved and loaded": "the outputs differ"}
    row |= {"LoRA step": "as on the float model: NaN", "merge": None, "inputs": None, "full size": {"error": "none"}}
    row |= {"fraction": 0.5, "dense": {"output head": [1, 0.25, "lm_head"]}}
    measured = {"classes": 2, "rows": [row, {"class": "B", "build": "error: no config"}]}
    assert models_rows(measured) == [
        ["A", "50.0% (tiny)", "", "output head 25.0%", "yes", "yes", "**no**", "as float", "—", "—"]
    ]
    assert models_differences(measured)[0] == "- A, saved and loaded: `the outputs differ`"
    assert models_left_out(measured) == ["- B: `error: no config`"]
    assert "0 of these go all the way" in models_summary(measured)
