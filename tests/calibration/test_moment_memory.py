"""How many moments of a wide layer's inputs are in memory at a time: each is as large as a square weight."""

from pathlib import Path

import pytest
from programs import memory_measured_by

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc: Linux only")

WIDTH = 3072
PROGRAM = f"""
import json, sys
import torch
from torch import nn
from _memory import MIB, peak_of_anonymous
import peft_quantlayers as pql

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, {WIDTH}, bias=False), nn.Linear({WIDTH}, 64, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))

class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

def quantize():
    torch.manual_seed(0)
    batches = [torch.randn(256, 64) for _ in range(4)]
    calibration = pql.Calibration(data=batches, **json.loads(sys.argv[1]))
    pql.quantize_model(Blocks(), pql.HQQConfig(nbits=3, group_size=64), calibration=calibration, progress=False)

quantize()  # what is loaded once
print(json.dumps(peak_of_anonymous(quantize) * MIB / (4 * {WIDTH} ** 2)))
"""


@pytest.mark.parametrize(
    ("options", "most"),
    [('{"asymmetric_targets": false}', 3.5), ("{}", 6.5), ('{"initial_codes": "best"}', 8.5)],
    ids=["symmetric", "asymmetric", "initial codes"],
)
def test_moments_are_dropped_when_nothing_needs_them(options, most):
    assert memory_measured_by(PROGRAM, options) < most
