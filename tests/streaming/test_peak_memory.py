"""A part leaves nothing behind in memory: what is resident does not grow from part to part."""

from pathlib import Path

import bench_streaming
import pytest
from _memory import MIB
from programs import memory_measured_by

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc: Linux only")

PROGRAM = """
import json
import sys

import bench_streaming
from _memory import MIB, resident_bytes
import peft_quantlayers as pql
from peft_quantlayers.streaming import checkpoint_parts, quantize_files

quantize_files.PART_BYTES = 2**21
own, resident = checkpoint_parts.PartsOfModel.make, []

def make(self, work, number):
    own(self, work, number)
    resident.append(resident_bytes("RssAnon") / MIB)
    assert all(tensor.is_meta for tensor in self.checkpoint.model.state_dict().values())

checkpoint_parts.PartsOfModel.make = make
pql.quantize_checkpoint(*sys.argv[1:], bench_streaming.CONFIG, progress=False)
print(json.dumps(resident))
"""


def test_memory_does_not_grow_from_part_to_part(tmp_path):
    bench_streaming.write_checkpoint(tmp_path / "float", hidden=512, layers=8, vocabulary=512)
    resident = memory_measured_by(PROGRAM, tmp_path / "float", tmp_path / "quantized")
    written = sum(file.stat().st_size for file in (tmp_path / "quantized").glob("*.safetensors")) / MIB
    assert len(resident) > 6
    assert written > 15
    assert max(resident[1:]) - resident[0] < 0.4 * written
