"""The benchmark that waits for a GPU goes through all its parts: nobody may have a GPU long enough to mend it."""

import json
import subprocess
import sys
from pathlib import Path

BENCH_GPU = Path(__file__).parents[1] / "benchmarks" / "bench_gpu.py"
PARTS = {"copying", "decoding", "dequantizing", "training", "quantizing", "switch_points", "tile_sizes"}
PARTS |= {"decoding_slow_peers"}


def test_the_gpu_benchmark_runs_in_small_on_a_cpu(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, str(BENCH_GPU), "--device", "cpu", "--tiny", "--no-tests", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(output.read_text())
    assert not result["failed"]
    assert not result["left_out"]
    assert set(result) >= PARTS
    assert all(result[part] for part in PARTS)
