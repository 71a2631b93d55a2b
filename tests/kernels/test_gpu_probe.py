"""Where Triton cannot run, everything runs in plain torch, with one warning that says why."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from quantlayers_kernels import gpu, gpu_probe

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh():
    """Nothing is known of any device, before and after."""
    for cached in (gpu_probe.capability, gpu_probe._can_launch):
        cached.cache_clear()
    yield
    for cached in (gpu_probe.capability, gpu_probe._can_launch):
        cached.cache_clear()


@pytest.fixture
def a_gpu_of(monkeypatch):
    """A GPU of a compute capability, which records no graph."""

    def make(major: int, minor: int) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.version, "hip", None)
        return GPU

    return make


def test_a_gpu_that_triton_does_not_know_is_named_once(a_gpu_of, caplog):
    device = a_gpu_of(6, 1)
    assert not gpu_probe.can_launch(device)
    assert not gpu_probe.can_launch(device)
    (record,) = caplog.records
    assert "capability is 6.1" in record.message
    assert "plain torch" in record.message


@pytest.mark.parametrize(("capability", "reads"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_needs_a_gpu_with_instructions_for_it(capability, reads, a_gpu_of):
    assert gpu_probe.can_read(torch.bfloat16, a_gpu_of(*capability)) == reads
    assert gpu_probe.can_read(torch.float16, a_gpu_of(*capability))
    assert not gpu_probe.can_read(torch.float64, a_gpu_of(*capability))


def test_several_tokens_are_left_to_cublas_where_triton_has_no_tensor_cores(a_gpu_of, monkeypatch):
    class OnGpu:
        dtype, device = torch.float16, GPU

    a_gpu_of(7, 5)
    assert not gpu.has_tensor_cores(OnGpu)
    gpu_probe.capability.cache_clear()
    a_gpu_of(8, 0)
    assert gpu.has_tensor_cores(OnGpu)
    monkeypatch.setattr(OnGpu, "dtype", torch.float32)
    assert not gpu.has_tensor_cores(OnGpu)


def test_capabilities_of_amds_gpus_mean_something_else(a_gpu_of, monkeypatch):
    device = a_gpu_of(6, 0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert gpu_probe.can_read(torch.bfloat16, device)


@pytest.mark.parametrize("kind", ["error", "wrong"])
def test_a_kernel_that_fails_is_tried_once(kind, monkeypatch, caplog):
    tried = []

    class Kernel:
        def __getitem__(self, grid):
            return self

        def __call__(self, *args, **kwargs):
            tried.append(1)
            if kind == "error":
                raise RuntimeError("Failed to find C compiler\nmore")

    broken = ModuleType("probe_kernel")
    broken.copy = Kernel()
    monkeypatch.setitem(sys.modules, "quantlayers_kernels.probe_kernel", broken)
    device = torch.device("cpu")
    assert not gpu_probe.can_launch(device)
    assert not gpu_probe.can_launch(device)
    assert len(tried) == 1
    assert ("Failed to find C compiler" if kind == "error" else "wrote something else") in caplog.text


def test_a_graph_that_is_recorded_is_not_disturbed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert gpu_probe.can_launch(GPU)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_tensors_on_a_device_that_cannot_launch_take_the_plain_path(monkeypatch, caplog):
    monkeypatch.setattr(gpu, "DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(gpu_probe, "_failure", lambda device: "nothing runs here")
    assert not gpu.can_hold(torch.ones(2))
    assert "nothing runs here" in caplog.text
