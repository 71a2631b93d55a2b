"""Saved models are whole, can be read again, and are verified; what is not is refused with the way out."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from golden.files import tensors_of
from integrations.tiny import FAMILIES, tiny_model, token_ids
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import peft_quantlayers as pql
from peft_quantlayers import AQLMConfig, HQQConfig
from peft_quantlayers.formats import checksums
from peft_quantlayers.storage import locked_folder, staged_folder

CONFIG = HQQConfig(nbits=4, group_size=16)
SHARDS = {"max_shard_size": "20KB"}


def quantized(seed: int = 0, family: str = "llama", config: pql.QuantConfig = CONFIG) -> PreTrainedModel:
    model = tiny_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(seed * 0.01)
    return pql.quantize_model(model, config, progress=False)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def edit(file: Path, **changes: torch.Tensor) -> None:
    """Other tensors in a file whose header stays as it is."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(tensors_of(file) | changes, file, metadata=metadata)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pql.save_model(quantized(), folder / "one")
    pql.save_model(quantized(), folder / "sharded", **SHARDS)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved / "one", tmp_path / "model"))


@pytest.fixture
def sharded(saved, tmp_path):
    return Path(shutil.copytree(saved / "sharded", tmp_path / "sharded"))


# ---- checksums


@pytest.mark.parametrize("how", ["save_model", "save_pretrained"])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"bert"}))
def test_every_tensor_has_a_checksum_under_its_name_in_the_file(family, how, tmp_path):
    model = quantized(family=family)
    if how == "save_model":
        pql.save_model(model, tmp_path, **SHARDS)
    else:
        model.save_pretrained(tmp_path, **SHARDS)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        with safe_open(file, framework="pt") as opened:
            (stored, *_) = json.loads(opened.metadata()[checksums.METADATA_KEY])
        for name, tensor in tensors_of(file).items():
            assert stored[name] == checksums.checksum(tensor)
    assert pql.verify_model(tmp_path) == []
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("original", [True, False])
def test_names_that_transformers_changes_while_saving_are_those_of_the_checksums(original, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 128}
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    ).eval()
    config = HQQConfig(nbits=4, group_size=16, skip_modules=["experts"])
    pql.quantize_model(model, config, progress=False)
    pql.save_model(model, tmp_path, save_original_format=original)
    assert any("experts.0." in name for name in tensors_of(tmp_path / "model.safetensors")) == original
    assert pql.verify_model(tmp_path) == []
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_models_in_a_published_layout_carry_checksums_too(tmp_path):
    config = AQLMConfig(num_codebooks=1, nbits_per_codebook=4, in_group_size=8, rounds=1)
    pql.save_model(quantized(config=config), tmp_path / "aqlm")
    assert json.loads((tmp_path / "aqlm" / "config.json").read_text())["quantization_config"]["quant_method"] == "aqlm"
    assert pql.verify_model(tmp_path / "aqlm") == []
    file = tmp_path / "aqlm" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        load(tmp_path / "aqlm")


@pytest.mark.parametrize("name", ["codes", "scale", "norm", "embedding"])
def test_one_flipped_bit_is_found_by_name(name, folder):
    key = {
        "codes": "model.layers.1.mlp.up_proj.W_q",
        "scale": "model.layers.1.mlp.up_proj.scale",
        "norm": "model.layers.0.input_layernorm.weight",
        "embedding": "model.embed_tokens.weight",
    }[name]
    file = folder / "model.safetensors"
    flipped = tensors_of(file)[key].clone()
    flipped.view(torch.uint8).view(-1)[5] ^= 1
    edit(file, **{key: flipped})
    with pytest.raises(ValueError, match=rf"{key}: does not have the checksum.*\n.*save it again"):
        load(folder)
    assert [(damage.name, damage.file) for damage in pql.verify_model(folder)] == [(key, "model.safetensors")]


def test_swapped_tensors_of_one_shape_are_found(folder):
    names = [f"model.layers.{i}.mlp.up_proj.W_q" for i in range(2)]
    tensors = tensors_of(folder / "model.safetensors")
    edit(folder / "model.safetensors", **{names[0]: tensors[names[1]], names[1]: tensors[names[0]]})
    with pytest.raises(ValueError, match=r"2 tensor\(s\)"):
        load(folder)
    assert sorted(damage.name for damage in pql.verify_model(folder)) == names


@pytest.mark.parametrize("change", ["another dtype", "another shape"])
def test_a_relabelled_tensor_is_found(change, folder):
    key, file = "model.norm.weight", folder / "model.safetensors"
    tensor = tensors_of(file)[key]
    edit(file, **{key: tensor.view(torch.int32) if change == "another dtype" else tensor.view(8, 8)})
    assert [damage.name for damage in pql.verify_model(folder)] == [key]
    with pytest.raises(ValueError, match=key):
        load(folder)


def test_files_of_two_saves_are_not_mixed(sharded, tmp_path):
    pql.save_model(quantized(seed=1), tmp_path / "other", **SHARDS)
    shard = sorted(sharded.glob("*.safetensors"))[1].name
    shutil.copy(tmp_path / "other" / shard, sharded / shard)
    with pytest.raises(ValueError, match=f"{shard}: belongs to another save"):
        load(sharded)
    assert [damage.file for damage in pql.verify_model(sharded)] == [shard]


@pytest.mark.parametrize("case", ["missing tensor", "new tensor", "tensor in two files"])
def test_a_file_with_other_tensors_than_were_saved_is_refused(case, sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    with safe_open(first, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = tensors_of(first)
    name = sorted(tensors)[0]
    if case == "missing tensor":
        del tensors[name]
    elif case == "new tensor":
        tensors["model.surprise"] = torch.ones(1)
    else:
        name, tensor = next(iter(tensors_of(second).items()))
        tensors[name] = tensor
    save_file(tensors, first, metadata=metadata)
    with pytest.raises(ValueError, match=r"is missing|was not saved with this model|both hold the tensor"):
        load(sharded)
    assert pql.verify_model(sharded)


def test_a_missing_or_cut_off_file_is_said_by_verify_model(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-10])
    damage = {damage.file: damage.reason for damage in pql.verify_model(sharded)}
    assert damage[first.name] == "is missing"
    assert "incomplete" in damage[second.name]


def test_the_environment_switches_checksums_off(folder, monkeypatch):
    file = folder / "model.safetensors"
    edit(file, **{"model.norm.weight": torch.full((64,), 2.0)})
    monkeypatch.setenv(checksums.SWITCH, "1")
    model = load(folder)
    assert torch.equal(model.model.norm.weight, torch.full((64,), 2.0))
    pql.save_model(model, folder.parent / "again")
    with pytest.raises(ValueError, match="carry no checksums"):
        pql.verify_model(folder.parent / "again")


def test_a_file_without_checksums_loads_and_cannot_be_verified(folder):
    file = folder / "model.safetensors"
    save_file(tensors_of(file), file, metadata={"format": "pt"})
    load(folder)
    with pytest.raises(ValueError, match="save_model to add them"):
        pql.verify_model(folder)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        pql.verify_model(folder.parent)


def test_a_pipe_in_the_place_of_the_weights_is_refused(folder, sharded):
    """Reading it would wait for a writer for ever."""
    file = sorted(sharded.glob("*.safetensors"))[0]
    for path in (file, folder / "model.safetensors"):
        path.unlink()
        os.mkfifo(path)
        assert "no regular file" in pql.verify_model(path.parent)[0].reason
    with pytest.raises(ValueError, match="no regular file"):
        load(sharded)


# ---- saving


def test_a_save_that_could_not_be_read_again_is_refused_and_the_old_model_stays(folder, monkeypatch):
    expected, model = logits(load(folder)), quantized(seed=1)
    save = PreTrainedModel.save_pretrained

    def without_a_tensor(self, written, **kwargs):
        save(self, written, **kwargs)
        tensors = tensors_of(written / "model.safetensors")
        del tensors["model.layers.0.mlp.up_proj.scale"]
        save_file(tensors, written / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", without_a_tensor)
    with pytest.raises(ValueError, match=r"would not load again, so it was not saved.*up_proj\.scale"):
        pql.save_model(model, folder, overwrite=True)
    assert torch.equal(logits(load(folder)), expected)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@pytest.fixture
def half_moved(sharded, monkeypatch):
    """A folder as a kill leaves it while files are moved: no clean-up runs."""
    rename, names = Path.rename, []

    def interrupted(self, target):
        names.append(self.name)
        if len(names) == 12:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr("peft_quantlayers.storage.staging.recover", lambda target, kind: None)
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pql.save_model(quantized(seed=1), sharded, overwrite=True, **SHARDS)
    assert "interrupted" in (sharded / "config.json").read_text()
    return sharded


def hidden(folder: Path) -> list[str]:
    return [path.name for parent in (folder, folder.parent) for path in parent.glob(".*saving*")]


@pytest.mark.parametrize(
    "reader",
    [
        AutoModelForCausalLM.from_pretrained,
        LlamaForCausalLM.from_pretrained,
        lambda folder: AutoModelForCausalLM.from_pretrained(folder.parent, subfolder=folder.name),
        lambda folder: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)) and load(folder),
        lambda folder: pql.undo_interrupted_save(folder) and load(folder),
    ],
    ids=["auto", "llama", "subfolder", "config", "undo"],
)
def test_a_half_moved_folder_is_read_as_the_old_model(reader, half_moved):
    assert torch.equal(logits(reader(half_moved)), logits(quantized()))
    assert hidden(half_moved) == []
    assert pql.verify_model(half_moved) == []
    assert not pql.undo_interrupted_save(half_moved)


def test_without_our_import_a_half_moved_folder_is_refused_with_the_way_out(half_moved):
    pql.unregister()
    try:
        with pytest.raises(ValueError, match=r"interrupted while files were moved.*undo_interrupted_save"):
            load(half_moved)
    finally:
        pql.register()
    assert torch.equal(logits(load(half_moved)), logits(quantized()))


def test_a_half_moved_folder_that_is_being_written_or_read_only_says_so(half_moved, monkeypatch):
    monkeypatch.setattr("peft_quantlayers.integrations.interrupted_save._WAIT_SECONDS", 0.1)
    with locked_folder(half_moved.resolve()), pytest.raises(OSError, match=r"cannot be brought back.*Make the folder"):
        load(half_moved)
    assert torch.equal(logits(load(half_moved)), logits(quantized()))


def test_a_save_over_a_half_moved_folder_is_whole(half_moved):
    pql.save_model(quantized(seed=2), half_moved, overwrite=True)
    assert torch.equal(logits(load(half_moved)), logits(quantized(seed=2)))
    assert hidden(half_moved) == []


def test_overwriting_leaves_adapters_alone(folder, tmp_path):
    (folder / "adapter_model.safetensors").write_text("mine")
    (folder / "model-00001-of-00009.safetensors").write_text("an old shard")
    pql.save_model(quantized(), folder, overwrite=True)
    assert (folder / "adapter_model.safetensors").read_text() == "mine"
    assert sorted(path.name for path in folder.glob("model*")) == ["model.safetensors"]
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds an adapter"):
        pql.save_model(quantized(), folder, overwrite=True)


@pytest.mark.parametrize("n_shards", ["more", "fewer"])
def test_a_model_takes_the_place_of_one_with_another_number_of_files(n_shards, folder, sharded):
    target, kwargs = (folder, SHARDS) if n_shards == "more" else (sharded, {})
    model = quantized(seed=1)
    pql.save_model(model, target, overwrite=True, **kwargs)
    assert torch.equal(logits(load(target)), logits(model))
    assert pql.verify_model(target) == []
    assert len(list(target.glob("*.safetensors"))) == (1 if n_shards == "fewer" else len(list(target.glob("*-of-*"))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda model, path: (path, model), r"swapped: save_model\(model, folder\)"),
        (lambda model, path: (nn.Sequential(nn.Linear(4, 4)), path), r"got Sequential.*state_dict"),
        (lambda model, path: (str(path), path), "got str"),
        (lambda model, path: (model, None), "folder must be a path, got NoneType"),
    ],
    ids=["swapped", "sequential", "a name", "no folder"],
)
def test_wrong_arguments_are_refused_with_a_sentence(arguments, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        pql.save_model(*arguments(quantized(), tmp_path / "model"))
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizers_name_is_no_tokenizer(tmp_path):
    with pytest.raises(TypeError, match="AutoTokenizer"):
        pql.save_model(quantized(), tmp_path / "model", tokenizer="gpt2")


def test_space_is_asked_for_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 2**20))
    with pytest.raises(OSError, match=r"needs about .* MB, and 1.05 MB are free"):
        pql.save_model(quantized(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_two_saves_into_one_new_folder_give_one_model_and_one_refusal(tmp_path, monkeypatch):
    save = PreTrainedModel.save_pretrained

    def slow(self, written, **kwargs):
        with pytest.raises(FileExistsError, match="another process"), staged_folder(tmp_path / "model", None):
            pass
        save(self, written, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", slow)
    pql.save_model(quantized(), tmp_path / "model")
    assert pql.verify_model(tmp_path / "model") == []
