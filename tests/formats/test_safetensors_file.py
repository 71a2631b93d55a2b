"""The files that are written tensor by tensor are those of the safetensors package."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_quantlayers.formats.safetensors_file import DTYPES, StoredTensor, write_safetensors


def tensors():
    made = {
        f"{name}.ä": torch.arange(6).reshape(2, 3).to(dtype)
        for name, dtype in zip("hgfedcbaponmlkji", DTYPES, strict=True)
    }
    return made | {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3), "turned": torch.rand(4, 5).T}


def test_the_bytes_are_those_of_the_safetensors_package(tmp_path):
    given = tensors()
    stored = {name: StoredTensor.of(tensor) for name, tensor in given.items()}
    write_safetensors(tmp_path / "ours", stored, given.__getitem__, metadata={"format": "pt"})
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    found = load_file(tmp_path / "ours")
    assert all(
        torch.equal(found[name].double(), tensor.double()) for name, tensor in given.items() if not tensor.is_complex()
    )


def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path):
    with pytest.raises(ValueError, match="x: expected"):
        write_safetensors(tmp_path / "x", {"x": StoredTensor("F32", (2,))}, lambda name: torch.zeros(3))
