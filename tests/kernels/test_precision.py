"""Products of half precision are computed in it where this machine does so faster, and in float32 elsewhere."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from quantlayers_kernels import precision
from quantlayers_kernels.precision import product_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def undecided(monkeypatch):
    monkeypatch.setattr(precision, "_FOUND", {})
    monkeypatch.setattr(precision, "_CHOSEN", "auto")


@pytest.fixture
def machine(monkeypatch):
    """Sets how much faster than float32 a half precision is, and whether the CPU has instructions for it."""

    def set_machine(gain: float, *, has_instructions: bool = True) -> list[torch.dtype]:
        timed: list[torch.dtype] = []

        def seconds(dtype: torch.dtype) -> float:
            timed.append(dtype)
            return 1.0 if dtype == torch.float32 else 1.0 / gain

        monkeypatch.setattr(precision, "_seconds", seconds)
        monkeypatch.setattr(precision, "_CPU_INSTRUCTIONS", dict.fromkeys(HALF, has_instructions))
        return timed

    return set_machine


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("gain", "is_used"), [(6.0, True), (1.3, True), (1.0, False), (0.5, False)])
def test_the_faster_dtype_is_used_and_measured_once(dtype, gain, is_used, machine):
    timed = machine(gain)
    for _ in range(2):
        assert product_dtype(dtype, CPU) == (dtype if is_used else torch.float32)
    assert timed == [torch.float32, dtype]


def test_nothing_is_measured_for_other_dtypes_and_devices_and_where_there_are_no_instructions(machine):
    timed = machine(6.0, has_instructions=False)
    for dtype in HALF:
        assert product_dtype(dtype, CPU) == torch.float32
        assert product_dtype(dtype, GPU) == dtype
    for dtype in (torch.float32, torch.float64):
        assert product_dtype(dtype, CPU) == dtype
    assert timed == []


@pytest.mark.parametrize(("choice", "expected"), [("half", torch.bfloat16), ("float32", torch.float32)])
def test_the_environment_decides_without_measuring(choice, expected, machine, monkeypatch):
    timed = machine(0.5 if choice == "half" else 6.0)
    monkeypatch.setattr(precision, "_CHOSEN", choice)
    compiled = torch.compile(lambda x: x.to(product_dtype(torch.bfloat16, x.device)), fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)).dtype == expected
    assert product_dtype(torch.bfloat16, CPU) == expected
    assert timed == []


def test_the_environment_is_read_at_import():
    program = "from quantlayers_kernels import precision; print(precision._CHOSEN)"
    environment = os.environ | {precision.CHOICE: "Float32"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["float32"]


def test_an_unknown_choice_is_refused(monkeypatch):
    monkeypatch.setattr(precision, "_CHOSEN", "double")
    with pytest.raises(ValueError, match=r"PEFT_QUANTLAYERS_CPU_HALF='double' is unknown. Choose from"):
        product_dtype(torch.bfloat16, CPU)


def test_compiled_code_measures_nothing(machine):
    timed = machine(0.5)

    @torch.compile(fullgraph=True, backend="eager")
    def cast(x):
        return x.to(product_dtype(torch.bfloat16, x.device))

    assert cast(torch.ones(2)).dtype == torch.bfloat16
    assert timed == []


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_measurement_is_a_time_that_no_mode_sees(dtype):
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        assert 0 < precision._seconds(dtype) < 10
    assert counter.get_total_flops() == 0
