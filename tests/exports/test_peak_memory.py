"""A folder is exported a layer at a time: memory stays near the largest layer, not the model."""

from pathlib import Path

import bench_streaming
import pytest
from _memory import MIB
from programs import memory_measured_by

import peft_quantlayers as pql

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc: Linux only")

HIDDEN, FEW, MANY = 512, 3, 12
LARGEST = 4 * HIDDEN * HIDDEN * 4 / MIB  # MiB of the largest layer in float32
PROGRAM = """
import json
import sys

from _memory import peak_of_anonymous
import peft_quantlayers as pql

format, out, *folders = sys.argv[1:]
pql.export(folders[0], f"{out}/first", format)  # what is loaded once
peaks = [peak_of_anonymous(lambda: pql.export(each, f"{out}/{n}", format)) for n, each in enumerate(folders)]
print(json.dumps(peaks))
"""


def quantized_folder(folder, layers):
    bench_streaming.write_checkpoint(folder / "float", hidden=HIDDEN, layers=layers, vocabulary=512)
    pql.quantize_checkpoint(folder / "float", folder / "quantized", bench_streaming.CONFIG, progress=False)
    return folder / "quantized"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [quantized_folder(tmp_path_factory.mktemp("model"), layers) for layers in (FEW, MANY)]


@pytest.mark.parametrize("format", ["mlx", "dense"])
def test_memory_does_not_grow_with_the_number_of_layers(folders, tmp_path, format):
    peaks = memory_measured_by(PROGRAM, format, tmp_path, *folders)
    written = [sum(file.stat().st_size for file in (tmp_path / str(n)).glob("*.safetensors")) / MIB for n in (0, 1)]
    assert written[1] - written[0] > 4 * LARGEST
    assert max(peaks) < 14 * LARGEST
    # Held tensors would make it 1.
    assert peaks[1] - peaks[0] < 0.7 * (written[1] - written[0])
