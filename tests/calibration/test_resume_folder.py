"""A resume folder is checked to the last value before the model is touched; what is refused names file and way out."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from every_method import methods_for, quick_config
from golden.files import tensors_of
from integrations.tiny import tiny_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from peft_quantlayers import AQLMConfig, Calibration, HQQConfig, quantize_model, quantized_modules
from peft_quantlayers.calibration import resume_folder
from peft_quantlayers.formats.checksums import METADATA_KEY
from peft_quantlayers.storage import locked_folder

IDS = torch.randint(3, 128, (16, 40), generator=torch.Generator().manual_seed(0))
CONFIGS = {name: quick_config(name) for name in methods_for("calibrated")} | {
    "hqq": HQQConfig(nbits=2, group_size=16),
    "aqlm-wide": AQLMConfig(num_codebooks=1, nbits_per_codebook=9, rounds=1),
}
UP = "mlp.up_proj"


def run(folder: Path, model=None, method: str = "hqq"):
    given = Calibration(data=IDS, n_tokens=640, sequence_length=40, damping=0.05, resume_folder=folder)
    return quantize_model(model or tiny_model(), CONFIGS[method], calibration=given, progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder and the state of the model for each method."""
    folders = {method: tmp_path_factory.mktemp(method) for method in CONFIGS}
    return {method: (folder, run(folder, method=method).state_dict()) for method, folder in folders.items()}


@pytest.fixture
def file(finished, tmp_path):
    """The second block of an HQQ model, in a copy of the folder."""
    return Path(shutil.copytree(finished["hqq"][0], tmp_path / "blocks")) / "model.layers.1.safetensors"


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def rewrite(file: Path, *, tensors=None, specs=None, with_checksums=False) -> None:
    """Other tensors or specs. Without checksums, as a version before them wrote, everything else has to find it."""
    metadata = metadata_of(file)
    if specs is not None:
        metadata["specs"] = specs if isinstance(specs, str) else json.dumps(specs)
    if not with_checksums:
        del metadata[METADATA_KEY]
    save_file({**tensors_of(file), **(tensors or {})}, file, metadata=metadata)


def without(file: Path, name: str) -> None:
    metadata = metadata_of(file)
    del metadata[METADATA_KEY]
    save_file({key: value for key, value in tensors_of(file).items() if key != name}, file, metadata=metadata)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def in_place_of_the_file(file: Path, make) -> None:
    file.unlink()
    make(file)


def specs_of(file: Path) -> dict:
    return json.loads(metadata_of(file)["specs"])


def renamed(specs: dict) -> dict:
    return {name.replace("layers.1", "layers.0"): fields for name, fields in specs.items()}


def other_bits(specs: dict) -> dict:
    return {name: fields | {"nbits": 4} for name, fields in specs.items()}


def relabelled(file: Path) -> None:
    """F32 becomes I32 in the header."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].replace(b'"F32"', b'"I32"', 1)
    file.write_bytes(data[:8] + header + data[8 + length :])


SCALE = f"{UP}.scale"
DAMAGES = {
    "cut off": cut_off,
    "empty": lambda file: file.write_bytes(b""),
    "no safetensors": lambda file: file.write_bytes(b"x" * 1000),
    "a flipped bit": flip,
    "a folder": lambda file: in_place_of_the_file(file, Path.mkdir),
    "a pipe": lambda file: in_place_of_the_file(file, os.mkfifo),
    "another block": lambda file: shutil.copy(file.with_name("model.layers.0.safetensors"), file),
    "no such block": lambda file: shutil.copy(file, file.with_name("model.layers.7.safetensors")),
    "tensor missing": lambda file: without(file, f"{UP}.W_q"),
    "norm missing": lambda file: without(file, "input_layernorm.weight"),
    "tensor too much": lambda file: rewrite(file, tensors={f"{UP}.extra": torch.ones(1)}),
    "scale of another shape": lambda file: rewrite(file, tensors={SCALE: tensors_of(file)[SCALE][:, :1].clone()}),
    "scale of integers": lambda file: rewrite(file, tensors={SCALE: tensors_of(file)[SCALE].int()}),
    "scale in float32": lambda file: rewrite(file, tensors={SCALE: tensors_of(file)[SCALE].double()}),
    "scale NaN": lambda file: rewrite(file, tensors={SCALE: torch.full_like(tensors_of(file)[SCALE], torch.nan)}),
    "norm Inf": lambda file: rewrite(file, tensors={"input_layernorm.weight": torch.full((64,), torch.inf)}),
    "relabelled": relabelled,
    "specs missing": lambda file: rewrite(file, specs="null"),
    "specs nested without end": lambda file: rewrite(file, specs="[" * 100_000),
    "specs no JSON": lambda file: rewrite(file, specs="{"),
    "specs a list": lambda file: rewrite(file, specs=[]),
    "specs without a layer": lambda file: rewrite(file, specs=dict(list(specs_of(file).items())[1:])),
    "specs of another block": lambda file: rewrite(file, specs=renamed(specs_of(file))),
    "specs of other bits": lambda file: rewrite(file, specs=other_bits(specs_of(file))),
    "specs without a method": lambda file: rewrite(file, specs={name: {} for name in specs_of(file)}),
    "specs of text": lambda file: rewrite(file, specs=dict.fromkeys(specs_of(file), "hqq")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_by_name_before_the_first_layer_is_placed(damage, file):
    DAMAGES[damage](file)
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"model\.layers\.\d\.safetensors.*Delete this file.*othing was quantized"):
        run(file.parent, model)
    assert not quantized_modules(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", CONFIGS)
def test_a_folder_is_taken_as_it_is_and_again_after_one_of_its_files_was_deleted(method, finished, tmp_path):
    folder, expected = finished[method]
    folder = Path(shutil.copytree(folder, tmp_path / "blocks"))
    (folder / "model.layers.0.safetensors").unlink()
    (folder / "model.layers.1.safetensors.0123.part").write_bytes(b"left by a kill")
    for _ in range(2):
        state = run(folder, method=method).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        assert sorted(path.name for path in folder.iterdir()) == [f"model.layers.{i}.safetensors" for i in range(2)]


def test_files_without_checksums_are_taken(file):
    rewrite(file)
    assert len(quantized_modules(run(file.parent))) == 14


def test_a_folder_in_use_and_a_file_in_its_place_are_refused(file, tmp_path):
    model = tiny_model()
    with locked_folder(file.parent, inside=True), pytest.raises(FileExistsError, match="another process"):
        run(file.parent, model)
    with pytest.raises(FileExistsError, match=r"is a file, not a folder.*othing was quantized"):
        run(file, model)
    with pytest.raises(OSError, match=r"cannot be made.*othing was quantized"):
        run(file / "below", model)
    assert not quantized_modules(model)


def test_a_full_disk_is_named_and_what_is_kept_goes_on_with_the_same_codes(finished, tmp_path, monkeypatch):
    def full(tensors, file, **kwargs):
        if "layers.1" in str(file):
            Path(file).write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, file, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(resume_folder, "save_file", full)
        with pytest.raises(OSError, match=r"the disk of resume_folder=.* is full\. Finished blocks are kept"):
            run(tmp_path)
    assert [file.name for file in tmp_path.glob("*")] == ["model.layers.0.safetensors"]
    state = run(tmp_path).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in finished["hqq"][1].items())


def padded(length: int) -> list[dict[str, torch.Tensor]]:
    """The same ids and mask, in sequences of ``length``."""
    mask = torch.ones_like(IDS)
    mask[:, 0] = 0
    return [{"input_ids": IDS.view(-1, length), "attention_mask": mask.view(-1, length)}]


@pytest.mark.parametrize(
    "changed", [{"compute_dtype": "bfloat16"}, {"length": 20}], ids=["compute_dtype", "other sequences"]
)
def test_blocks_of_a_run_that_differs_in_one_thing_are_refused(changed, tmp_path):
    def quantized(model, *, length=40, compute_dtype=None):
        config = HQQConfig(nbits=2, group_size=16, compute_dtype=compute_dtype)
        given = Calibration(data=padded(length), batch_size=64, resume_folder=tmp_path / "blocks")
        return quantize_model(model, config, calibration=given, progress=False)

    quantized(tiny_model())
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"belongs to another run[\s\S]*Nothing was quantized"):
        quantized(model, **changed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
