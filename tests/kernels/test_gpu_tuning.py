"""The form of a kernel is measured once for a machine and a kind of weight, and kept; it can be switched off."""

import json
import logging
from typing import NamedTuple

import pytest
import torch

from quantlayers_kernels import cache_folder, gpu_tuning

X = torch.zeros(1)
FACTS = (4, 4096, 4096, torch.float16)
KEY = "a kernel 4 4096 4096 torch.float16"


class Form(NamedTuple):
    rows: int
    warps: int


FIRST, SECOND, THIRD = FORMS = (Form(8, 4), Form(16, 4), Form(8, 8))


class Gpu:
    """A GPU on which each form takes some seconds, or raises an error."""

    def __init__(self) -> None:
        self.takes: dict[Form, float | Exception] = {FIRST: 3.0, SECOND: 1.0, THIRD: 2.0}
        self.ran: list[Form] = []

    def product(self, form: Form) -> torch.Tensor:
        self.ran.append(form)
        if isinstance(took := self.takes[form], Exception):
            raise took
        return X

    def seconds(self, run, device) -> float:
        run()
        return self.takes[self.ran[-1]]

    def fastest(self) -> Form:
        return gpu_tuning.fastest("a kernel", FACTS, FORMS, self.product, like=X)

    def fastest_in_another_process(self) -> Form:
        gpu_tuning._chosen.clear()
        self.ran.clear()
        return self.fastest()


def kept() -> list[dict]:
    """What lies in the folder: nothing else does."""
    return [json.loads(file.read_text()) for file in gpu_tuning.folder().iterdir()]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.setenv(cache_folder.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(gpu_tuning.SWITCH, raising=False)
    found = Gpu()
    monkeypatch.setattr(gpu_tuning, "_seconds", found.seconds)
    monkeypatch.setattr(gpu_tuning, "_can_measure", lambda device: True)
    monkeypatch.setattr(gpu_tuning, "_machine", lambda device: "a GPU")
    monkeypatch.setattr(gpu_tuning, "_say_once", lambda device: None)
    monkeypatch.setattr(gpu_tuning, "_chosen", {})
    return found


def test_the_fastest_form_is_measured_once_and_kept_for_other_processes(gpu):
    assert gpu.fastest() == SECOND
    assert gpu.ran == list(FORMS)
    assert gpu.fastest() == SECOND
    assert gpu.ran == list(FORMS)
    assert gpu_tuning.chosen() == {KEY: {"rows": 16, "warps": 4}}
    assert kept() == [{"machine": "a GPU", "key": KEY, "form": {"rows": 16, "warps": 4}}]
    assert gpu.fastest_in_another_process() == SECOND
    assert not gpu.ran


def test_weights_of_another_kind_and_other_machines_are_measured_for_themselves(gpu, monkeypatch):
    gpu.fastest()
    gpu.takes[THIRD] = 0.5
    assert gpu_tuning.fastest("a kernel", (*FACTS, 16), FORMS, gpu.product, like=X) == THIRD
    monkeypatch.setattr(gpu_tuning, "_machine", lambda device: "another GPU")
    assert gpu.fastest_in_another_process() == THIRD
    assert sorted(each["machine"] for each in kept()) == ["a GPU", "a GPU", "another GPU"]


def test_a_gain_within_the_noise_is_none(gpu):
    gpu.takes[FIRST] = 1.03
    assert gpu.fastest() == FIRST


def test_a_form_that_does_not_run_is_passed_over(gpu):
    gpu.takes[SECOND] = RuntimeError("out of resource: shared memory")
    assert gpu.fastest() == THIRD
    gpu.takes = {form: torch.OutOfMemoryError("CUDA out of memory") for form in FORMS}
    # Which the caller runs, and so raises what is wrong.
    assert gpu_tuning.fastest("a kernel", (1,), FORMS, gpu.product, like=X) == FIRST


def test_where_there_is_no_memory_to_measure_in_only_another_process_tries_again(gpu):
    gpu.takes = {form: torch.OutOfMemoryError("CUDA out of memory") for form in FORMS}
    assert gpu.fastest() == gpu.fastest() == FIRST
    assert gpu.ran == list(FORMS)
    gpu.takes = {FIRST: 3.0, SECOND: 1.0, THIRD: 2.0}
    assert gpu.fastest_in_another_process() == SECOND


def test_it_can_be_switched_off(gpu, monkeypatch):
    monkeypatch.setenv(gpu_tuning.SWITCH, "OFF")
    assert gpu.fastest() == FIRST
    assert not gpu.ran
    assert not gpu_tuning.folder().exists()
    monkeypatch.setenv(gpu_tuning.SWITCH, "sometimes")
    with pytest.raises(ValueError, match="PEFT_QUANTLAYERS_GPU_TUNING='sometimes' is unknown"):
        gpu.fastest()


def test_deterministic_results_take_the_form_of_all_machines(gpu):
    assert gpu.fastest() == SECOND
    torch.use_deterministic_algorithms(True)
    try:
        assert gpu.fastest() == FIRST
    finally:
        torch.use_deterministic_algorithms(False)
    assert gpu.fastest() == SECOND


def test_a_product_never_fails_for_want_of_the_fastest_form(gpu, monkeypatch, caplog):
    def no_home() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(cache_folder.VARIABLE)
    monkeypatch.setattr(gpu_tuning.Path, "home", no_home)
    assert gpu.fastest() == gpu.fastest() == FIRST
    (record,) = caplog.records
    assert "a kernel is not measured (RuntimeError: Could not determine home directory.)" in record.message


@pytest.mark.skipif(not gpu_tuning._FATAL, reason="this torch has no error of its own for accelerators")
def test_what_ends_all_work_on_the_gpu_is_raised_at_once(gpu):
    gpu.takes[SECOND] = torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        gpu.fastest()
    assert gpu.ran == [FIRST, SECOND]


def test_a_gpu_that_waits_for_the_host_is_measured_with_a_longer_pause(monkeypatch):
    pauses: list[int] = []

    def timed(run, device, n_flushes):
        pauses.append(n_flushes)
        return 1.0 / n_flushes, n_flushes < 4 * gpu_tuning.FLUSHES

    monkeypatch.setattr(gpu_tuning, "_timed", timed)
    assert gpu_tuning._seconds(lambda: X, X.device) == 1.0 / (4 * gpu_tuning.FLUSHES)
    assert pauses == [gpu_tuning.FLUSHES, 2 * gpu_tuning.FLUSHES, 4 * gpu_tuning.FLUSHES]
    monkeypatch.setattr(gpu_tuning, "_timed", lambda run, device, n_flushes: (n_flushes, True))
    assert gpu_tuning._seconds(lambda: X, X.device) == gpu_tuning.MAX_FLUSHES


def test_what_is_recorded_in_a_graph_is_not_measured_then(gpu, monkeypatch):
    with monkeypatch.context() as recording:
        recording.setattr(gpu_tuning, "_can_measure", lambda device: False)
        assert gpu.fastest() == FIRST
        assert not gpu.ran
    assert gpu.fastest() == SECOND
    with monkeypatch.context() as recording:
        recording.setattr(gpu_tuning, "_can_measure", lambda device: False)
        assert gpu.fastest() == SECOND


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", json.dumps({"key": KEY, "form": {"rows": 1}}), json.dumps({"form": SECOND}), "\x00"]
)
def test_a_file_that_is_damaged_or_names_no_form_is_measured_again(content, gpu):
    gpu_tuning.folder().mkdir(parents=True)
    gpu_tuning._file("a GPU", KEY).write_text(content)
    assert gpu.fastest() == SECOND
    assert gpu.fastest_in_another_process() == SECOND
    assert not gpu.ran


def test_processes_that_measure_at_the_same_time_take_the_same_form(gpu, monkeypatch):
    def while_another_one_writes(run, device) -> float:
        gpu_tuning.folder().mkdir(parents=True, exist_ok=True)
        gpu_tuning._file("a GPU", KEY).write_text(json.dumps({"key": KEY, "form": THIRD._asdict()}))
        return gpu.seconds(run, device)

    monkeypatch.setattr(gpu_tuning, "_seconds", while_another_one_writes)
    assert gpu.fastest() == THIRD


def test_a_folder_that_cannot_be_written_is_named_and_the_form_is_used(gpu, monkeypatch, tmp_path, caplog):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv(cache_folder.VARIABLE, str(tmp_path / "taken"))
    with caplog.at_level(logging.WARNING):
        assert gpu.fastest() == SECOND
    assert "cannot be written" in caplog.text
    assert gpu.fastest() == SECOND
    assert len(gpu.ran) == len(FORMS)


def test_a_tensor_on_the_cpu_takes_the_first_form(monkeypatch):
    monkeypatch.setattr(gpu_tuning, "_chosen", {})
    assert Gpu().fastest() == FIRST
