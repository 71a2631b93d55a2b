"""Peak memory of a process that quantizes from files to files: not that of the model, and the same for more layers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_streaming
import pytest
import transformers
from demo_model import demo_model_folder

import peft_quantlayers as pql

MIB = 2**20
BENCHMARK = Path(bench_streaming.__file__)

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc: Linux only")


def measured(source, destination, *, calibrated="no"):
    done = subprocess.run(
        [sys.executable, BENCHMARK, "--measure", source, destination, calibrated],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("calibrated", ["no", "yes"])
def test_more_layers_take_no_more_memory(calibrated, tmp_path):
    peaks, sizes = [], []
    for layers in (4, 20):
        source = tmp_path / f"float{layers}"
        bench_streaming.write_checkpoint(source, hidden=256, layers=layers, vocabulary=512)
        sizes.append(sum(file.stat().st_size for file in source.glob("*.safetensors")) / MIB)
        told = measured(source, tmp_path / f"quantized{layers}", calibrated=calibrated)
        peaks.append(told["peak_anonymous_mib"])
    assert sizes[1] - sizes[0] > 25
    assert peaks[1] - peaks[0] < 0.5 * (sizes[1] - sizes[0])


@pytest.mark.real_model
def test_a_real_model_takes_less_than_700_mb_and_has_the_bytes_of_quantizing_in_memory(tmp_path):
    source = demo_model_folder()
    told = measured(source, tmp_path / "quantized")
    assert told["peak_anonymous_mib"] < 700
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    pql.save_model(pql.quantize_model(model, bench_streaming.CONFIG, progress=False), tmp_path / "expected")
    found, expected = (tmp_path / name / "model.safetensors" for name in ("quantized", "expected"))
    assert found.read_bytes() == expected.read_bytes()
    assert (tmp_path / "quantized" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
