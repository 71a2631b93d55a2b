"""From files to files: the bytes of quantize_model and save_model, whatever interrupts it."""

import errno
import json
import os
import shutil

import pytest
import torch
import transformers
from _tiny_models import tiny_model
from every_method import METHODS, quick_config
from killed_runs import folders_of_killed_runs
from safetensors.torch import load_file

import peft_quantlayers as pql
from peft_quantlayers.storage import locked_folder
from peft_quantlayers.streaming import checkpoint_parts, quantize_files, work_folder

CONFIG = pql.HQQConfig(nbits=4, group_size=16, overrides={"layers.1.*": {"nbits": 3}})
PLAIN = pql.HQQConfig(nbits=4, group_size=16)

# Plain, tied, Conv1D, experts, renamed in files, joined and split tensors, encoder-decoders, two models in one.
CLASSES = (
    "LlamaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM", "HrmTextForCausalLM",
    "Step3p7ForConditionalGeneration", "T5ForConditionalGeneration", "BartForConditionalGeneration",
    "WhisperForConditionalGeneration", "LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration",
    "VisionEncoderDecoderModel", "BertForSequenceClassification",
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Tiny models have several parts too."""
    monkeypatch.setattr(quantize_files, "PART_BYTES", 20_000)


def saved(folder, name="LlamaForCausalLM", *, dtype=torch.float32, **kwargs):
    tiny_model(name).to(dtype).save_pretrained(folder, **kwargs)
    return folder


def tensors_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def in_memory(folder, destination, config):
    config_class = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, config_class).from_pretrained(folder)
    pql.save_model(pql.quantize_model(model, config, progress=False), destination)
    return destination


def assert_same(folder, expected):
    found, wanted = tensors_of(folder), tensors_of(expected)
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted)
    configs = [json.loads((each / "config.json").read_text()) for each in (folder, expected)]
    assert configs[0] == configs[1]
    assert pql.verify_model(folder) == []


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", CLASSES)
def test_it_writes_what_quantize_model_and_save_model_write(name, tmp_path):
    folder = saved(tmp_path / "float", name)
    returned = pql.quantize_checkpoint(folder, tmp_path / "quantized", PLAIN, progress=False)
    assert returned == tmp_path / "quantized"
    assert_same(returned, in_memory(folder, tmp_path / "expected", PLAIN))
    assert sorted(files_of(returned)) == sorted({*files_of(tmp_path / "expected"), "quantlayers_run.json"})
    assert not any(path.is_dir() for path in returned.iterdir())


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        *((quick_config(method), torch.float32) for method in METHODS),
        (CONFIG, torch.bfloat16),
        (CONFIG, torch.float16),
        (pql.AQLMConfig(num_codebooks=1, nbits_per_codebook=10, rounds=1), torch.float16),  # published, wide codes
        (pql.HQQConfig(nbits=2, group_size=32, compute_dtype="bfloat16"), torch.float32),
    ],
)
@pytest.mark.usefixtures("toy_method")
def test_every_method_and_dtype_gives_the_same_bytes(config, dtype, tmp_path):
    folder = saved(tmp_path / "float", dtype=dtype)
    pql.quantize_checkpoint(folder, tmp_path / "quantized", config, progress=False)
    assert_same(tmp_path / "quantized", in_memory(folder, tmp_path / "expected", config))


def test_scales_that_half_precision_cannot_hold_are_widened_as_in_memory(tmp_path):
    model = tiny_model("LlamaForCausalLM")
    model.model.layers[1].mlp.up_proj.weight.data *= 1e-7
    model.half().save_pretrained(tmp_path / "float")
    for config in (PLAIN, pql.AQLMConfig(num_codebooks=1, nbits_per_codebook=3, rounds=1)):
        method = config.spec_type.method
        pql.quantize_checkpoint(tmp_path / "float", tmp_path / method, config, progress=False)
        assert_same(tmp_path / method, in_memory(tmp_path / "float", tmp_path / f"{method}-expected", config))


def test_two_processes_write_the_same_files_as_one(tmp_path):
    folder = saved(tmp_path / "float")
    pql.quantize_checkpoint(folder, tmp_path / "one", CONFIG, progress=False)
    pql.quantize_checkpoint(folder, tmp_path / "two", CONFIG, n_processes=2, progress=False)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_shards_are_read_and_written(tmp_path):
    folder = saved(tmp_path / "float", max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    pql.quantize_checkpoint(folder, tmp_path / "quantized", PLAIN, max_shard_size="40KB", progress=False)
    assert len(list((tmp_path / "quantized").glob("*.safetensors"))) > 3
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    pql.quantize_model(model, PLAIN, progress=False).save_pretrained(tmp_path / "expected", max_shard_size="40KB")
    assert_same(tmp_path / "quantized", tmp_path / "expected")
    indices = [(tmp_path / name / "model.safetensors.index.json").read_text() for name in ("quantized", "expected")]
    assert indices[0] == indices[1]
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")


@pytest.mark.parametrize("kept", ["source", "target", "both"])
def test_tied_weights_are_found_whichever_of_them_is_in_the_file(kept, tmp_path):
    from safetensors.torch import save_file

    folder = saved(tmp_path / "float", "Gemma2ForCausalLM")
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    if kept != "source":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if kept == "target":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    pql.quantize_checkpoint(folder, tmp_path / "quantized", PLAIN, progress=False)
    assert_same(tmp_path / "quantized", in_memory(folder, tmp_path / "expected", PLAIN))


def test_what_lies_beside_the_weights_comes_along(tmp_path):
    folder = saved(tmp_path / "float")
    others = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "preprocessor_config.json": "{}",
        "LICENSE": "free",
    }
    for name, text in others.items():
        (folder / name).write_text(text)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (folder / "optimizer.pt").write_bytes(b"")
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [small]\n---\n# A model\n\nIts text.\n")
    target = pql.quantize_checkpoint(folder, tmp_path / "quantized", PLAIN, progress=False)
    assert {name: (target / name).read_text() for name in others} == others
    assert (target / "generation_config.json").read_text() == (folder / "generation_config.json").read_text()
    assert (target / "additional_chat_templates" / "tool.jinja").read_text() == "tool"
    assert not (target / "optimizer.pt").exists()
    card = (target / "README.md").read_text()
    assert "license: mit" in card
    assert "- small" in card
    assert "- quantlayers" in card
    assert "# Card of the float model" in card
    assert "Its text." in card
    run = json.loads((target / "quantlayers_run.json").read_text())
    assert run["config"] == json.loads(json.dumps(PLAIN.to_dict()))
    assert run["versions"]["torch"] == torch.__version__


class Killed(BaseException):
    pass


def killed_after(n_writes, monkeypatch):
    """Raise in the place of a kill, before the n-th file gets its name."""
    own, count = work_folder.replace_file, []

    def counting(file):
        count.append(file)
        if len(count) > n_writes:
            raise Killed
        return own(file)

    from peft_quantlayers.streaming import assembly

    monkeypatch.setattr(work_folder, "replace_file", counting)
    monkeypatch.setattr(assembly, "replace_file", counting)
    return count


def test_stopped_before_any_write_it_goes_on_and_ends_with_the_same_files(tmp_path, monkeypatch):
    folder, target = saved(tmp_path / "float"), tmp_path / "quantized"
    count = killed_after(10_000, monkeypatch)
    pql.quantize_checkpoint(folder, tmp_path / "expected", CONFIG, max_shard_size="60KB", progress=False)
    n_writes = len(count)
    assert n_writes > 15
    for n in range(1, n_writes):
        monkeypatch.undo()
        monkeypatch.setattr(quantize_files, "PART_BYTES", 20_000)
        killed_after(1 if n % 3 else n, monkeypatch)  # sometimes all that was there, mostly one file more each time
        with pytest.raises(Killed):
            pql.quantize_checkpoint(folder, target, CONFIG, max_shard_size="60KB", progress=False)
        assert not (target / "config.json").exists()
        if n % 3 == 0:
            shutil.rmtree(target)
            break
    for n in range(1, 200):
        monkeypatch.undo()
        monkeypatch.setattr(quantize_files, "PART_BYTES", 20_000)
        killed_after(2, monkeypatch)  # run.json or one part, or what is written last again
        try:
            pql.quantize_checkpoint(folder, target, CONFIG, max_shard_size="60KB", progress=False)
            break
        except Killed:
            assert n < 150
            if (target / ".quantizing" / "new" / "config.json").exists():
                monkeypatch.undo()
                monkeypatch.setattr(quantize_files, "PART_BYTES", 20_000)
                pql.quantize_checkpoint(folder, target, CONFIG, max_shard_size="60KB", progress=False)
                break
    assert files_of(target) == files_of(tmp_path / "expected")


def test_killed_at_any_file_operation_it_ends_with_the_same_files(tmp_path):
    source = saved(tmp_path / "float")

    def run(folder):
        pql.quantize_checkpoint(source, folder, CONFIG, max_shard_size="60KB", progress=False)

    run(tmp_path / "expected")
    folders = folders_of_killed_runs(run, tmp_path / "all", int(os.environ.get("KILLS", "8")), seed=0)
    assert folders
    assert all(files_of(each) == files_of(tmp_path / "expected") for each in folders)


def test_the_same_call_does_nothing_once_all_is_there_and_another_one_is_refused(tmp_path, monkeypatch):
    folder, target = saved(tmp_path / "float"), tmp_path / "quantized"
    pql.quantize_checkpoint(folder, target, PLAIN, progress=False)
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    monkeypatch.setattr(checkpoint_parts.PartsOfModel, "make", None)
    pql.quantize_checkpoint(folder, target, PLAIN, progress=False)
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} == before
    with pytest.raises(FileExistsError, match="another model, or the same one quantized in another way"):
        pql.quantize_checkpoint(folder, target, CONFIG, progress=False)


def test_an_unfinished_run_of_another_config_is_refused_and_can_be_removed(tmp_path, monkeypatch):
    folder, target = saved(tmp_path / "float"), tmp_path / "quantized"
    killed_after(3, monkeypatch)
    with pytest.raises(Killed):
        pql.quantize_checkpoint(folder, target, CONFIG, progress=False)
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match=r"unfinished run with other values of config.*resume=False"):
        pql.quantize_checkpoint(folder, target, PLAIN, progress=False)
    pql.quantize_checkpoint(folder, target, PLAIN, resume=False, progress=False)
    assert_same(target, in_memory(folder, tmp_path / "expected", PLAIN))


def test_a_full_disk_says_so_and_keeps_what_is_done(tmp_path, monkeypatch):
    folder, target = saved(tmp_path / "float"), tmp_path / "quantized"
    own, count = work_folder.write_safetensors, []

    def full(file, *args, **kwargs):
        count.append(file)
        if len(count) == 4:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        own(file, *args, **kwargs)

    monkeypatch.setattr(work_folder, "write_safetensors", full)
    with pytest.raises(
        OSError, match=r"^\[Errno 28\] the disk of .* is full\. 3 of \d+ parts are finished and kept.*call the same"
    ):
        pql.quantize_checkpoint(folder, target, PLAIN, progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(quantize_files, "PART_BYTES", 20_000)
    pql.quantize_checkpoint(folder, target, PLAIN, progress=False)
    assert_same(target, in_memory(folder, tmp_path / "expected", PLAIN))


def test_too_little_space_is_told_before_anything_is_quantized(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OSError, match=r"needs about .* MB more, and 0.00 MB are free"):
        pql.quantize_checkpoint(saved(tmp_path / "float"), tmp_path / "quantized", PLAIN, progress=False)


def test_a_damaged_part_is_named_and_made_again_once_it_is_gone(tmp_path, monkeypatch):
    folder, target = saved(tmp_path / "float"), tmp_path / "quantized"
    killed_after(4, monkeypatch)
    with pytest.raises(Killed):
        pql.quantize_checkpoint(folder, target, PLAIN, progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(quantize_files, "PART_BYTES", 20_000)
    file = target / ".quantizing" / "00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"00001\.safetensors is damaged.*Delete it and call again"):
        pql.quantize_checkpoint(folder, target, PLAIN, progress=False)
    file.unlink()
    (target / ".quantizing" / "plan.json").unlink()
    pql.quantize_checkpoint(folder, target, PLAIN, progress=False)
    assert_same(target, in_memory(folder, tmp_path / "expected", PLAIN))


def test_a_second_process_is_refused(tmp_path):
    with locked_folder(tmp_path / "quantized"), pytest.raises(FileExistsError, match="another process is writing"):
        pql.quantize_checkpoint(saved(tmp_path / "float"), tmp_path / "quantized", PLAIN, progress=False)


def without(key):
    def edit(folder):
        from safetensors.torch import save_file

        tensors = load_file(folder / "model.safetensors")
        del tensors[key]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def with_config(**fields):
    def edit(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return edit


@pytest.mark.parametrize(
    ("edit", "error", "match"),
    [
        (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), FileNotFoundError, "no model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), ValueError, "holds an adapter"),
        (without("model.norm.weight"), ValueError, r"lacks 1 tensor.*model\.norm\.weight"),
        (with_config(quantization_config={"quant_method": "fp8"}), ValueError, "quantized already \\(fp8\\)"),
        (with_config(architectures=["OwnForCausalLM"]), ValueError, "OwnForCausalLM.*has none such"),
        (with_config(intermediate_size=64), ValueError, "has the shape"),
    ],
    ids=["no config", "no weights", "adapter", "lacks a tensor", "quantized", "unknown class", "other shape"],
)
def test_a_source_that_is_no_float_model_is_refused(edit, error, match, tmp_path):
    folder = saved(tmp_path / "float")
    edit(folder)
    with pytest.raises(error, match=match):
        pql.quantize_checkpoint(folder, tmp_path / "quantized", PLAIN, progress=False)


def test_other_arguments_that_cannot_be_are_refused_before_anything_is_written(tmp_path):
    folder = saved(tmp_path / "float")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for destination, error, match in (
        (folder, ValueError, "source and destination"),
        (tmp_path / "full", FileExistsError, "not empty"),
        (tmp_path / "full" / "notes.txt", FileExistsError, "is a file"),
    ):
        with pytest.raises(error, match=match):
            pql.quantize_checkpoint(folder, destination, PLAIN, progress=False)
    with pytest.raises(FileNotFoundError, match=r"no/such/model/here is no folder"):
        pql.quantize_checkpoint("no/such/model/here", tmp_path / "quantized", PLAIN, progress=False)
    with pytest.raises(TypeError, match="config must be an HQQConfig"):
        pql.quantize_checkpoint(folder, tmp_path / "quantized", {"nbits": 4})
    with pytest.raises(ValueError, match="max_shard_size='a lot' is no size"):
        pql.quantize_checkpoint(folder, tmp_path / "quantized", PLAIN, max_shard_size="a lot")
    with pytest.raises(ValueError, match="matches no module"):
        pql.quantize_checkpoint(folder, tmp_path / "quantized", pql.HQQConfig(skip_modules=["nothing"]))
    assert not (tmp_path / "quantized").exists()
    assert os.listdir(tmp_path / "full") == ["notes.txt"]


def test_tensors_that_the_model_has_no_place_for_are_left_out_with_a_warning(tmp_path, caplog):
    from safetensors.torch import save_file

    folder = saved(tmp_path / "float")
    tensors = load_file(folder / "model.safetensors") | {"model.other.weight": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    pql.quantize_checkpoint(folder, tmp_path / "quantized", PLAIN, progress=False)
    assert "no place for 1 tensor(s), which are left out, for example ['model.other.weight']" in caplog.text
    assert "model.other.weight" not in tensors_of(tmp_path / "quantized")


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    model = tiny_model("LlamaForCausalLM")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj.*NaN"):
        pql.quantize_checkpoint(tmp_path / "float", tmp_path / "quantized", PLAIN, progress=False)
