"""Calibrated from files to files: the bytes of quantize_model in memory, one block at a time, resumed after a kill."""

import gc
import json
import os

import pytest
import torch
import transformers
from _tiny_models import tiny_inputs, tiny_model
from every_method import methods_for, quick_config
from killed_runs import folders_of_killed_runs
from mixtures import tiny_mixture
from safetensors.torch import load_file

import peft_quantlayers as pql
from peft_quantlayers.calibration.quantize_calibrated import QuantizeVisitor
from peft_quantlayers.streaming import calibrated, checkpoint_parts, folder_blocks, quantize_files

CONFIG = pql.HQQConfig(nbits=4, group_size=16)
IDS = torch.randint(3, 100, (600,), generator=torch.Generator().manual_seed(3))

# Plain, tied, encoder-decoders, a tower that text does not reach, several modalities.
CLASSES = (
    "LlamaForCausalLM", "Gemma2ForCausalLM", "T5ForConditionalGeneration",
    "WhisperForConditionalGeneration", "LlavaForConditionalGeneration", "BertForSequenceClassification",
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(quantize_files, "PART_BYTES", 20_000)


def saved(folder, name="LlamaForCausalLM"):
    model = tiny_model(name)
    model.save_pretrained(folder)
    return model


def calibration_for(model, **options):
    inputs = tiny_inputs(model)
    data = IDS if set(inputs) - {"use_cache"} == {"input_ids"} else [inputs | {"use_cache": False}] * 2
    if data is not IDS:
        data = [{key: value for key, value in batch.items() if key != "use_cache"} for batch in data]
    return pql.Calibration(data=data, n_tokens=256, sequence_length=64, **options)


def in_memory(folder, destination, config, calibration):
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder)
    pql.save_model(pql.quantize_model(model, config, calibration=calibration, progress=False), destination)
    return destination


def assert_same(folder, expected):
    found, wanted = load_file(folder / "model.safetensors"), load_file(expected / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert json.loads((folder / "config.json").read_text()) == json.loads((expected / "config.json").read_text())
    assert pql.verify_model(folder) == []


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("is_asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("name", CLASSES)
def test_it_writes_what_calibration_in_memory_writes(name, is_asymmetric, tmp_path):
    calibration = calibration_for(saved(tmp_path / "float", name), asymmetric_targets=is_asymmetric)
    pql.quantize_checkpoint(
        tmp_path / "float", tmp_path / "quantized", CONFIG, calibration=calibration, progress=False
    )
    assert_same(tmp_path / "quantized", in_memory(tmp_path / "float", tmp_path / "expected", CONFIG, calibration))


@pytest.mark.parametrize(
    "config",
    [
        *map(quick_config, methods_for("calibrated")),
        pql.AQLMConfig(num_codebooks=1, nbits_per_codebook=10, rounds=1),
        pql.HQQConfig(nbits=3, group_size=32, quantize_lm_head=True, overrides={"down_proj": {"nbits": 8}}),
    ],
    ids=[*methods_for("calibrated"), "wide codes", "head too"],
)
def test_every_method_and_layers_outside_of_blocks(config, tmp_path):
    calibration = calibration_for(saved(tmp_path / "float"))
    results = []
    pql.quantize_checkpoint(
        tmp_path / "float", tmp_path / "quantized", config, calibration=calibration, progress=False,
        on_layer=results.append,
    )  # fmt: skip
    assert_same(tmp_path / "quantized", in_memory(tmp_path / "float", tmp_path / "expected", config, calibration))
    n_layers = len(json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"].get(
        "modules", [None] * 14
    ))  # fmt: skip
    assert len(results) == n_layers
    assert all(result.output_error is not None for result in results)


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mixtral", "gpt_oss", "llama4", "longcat_flash", "granitemoe", "jetmoe"]
)
def test_experts_are_calibrated_one_block_at_a_time(family, tmp_path):
    tiny_mixture(family).save_pretrained(tmp_path / "float")
    calibration = pql.Calibration(data=IDS, n_tokens=256, sequence_length=64)
    results = []
    pql.quantize_checkpoint(
        tmp_path / "float", tmp_path / "quantized", CONFIG, calibration=calibration, progress=False,
        on_layer=results.append,
    )  # fmt: skip
    assert_same(tmp_path / "quantized", in_memory(tmp_path / "float", tmp_path / "expected", CONFIG, calibration))
    stacks = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]["stacks"]
    errors = [result.output_error for result in results if result.name in stacks]
    assert len(errors) == len(stacks) >= 4
    assert set(errors) == {None} if family in ("longcat_flash", "jetmoe") else all(errors)


def test_a_model_of_one_block_is_calibrated(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    calibration = pql.Calibration(data=IDS, n_tokens=256, sequence_length=64)
    pql.quantize_checkpoint(
        tmp_path / "float", tmp_path / "quantized", CONFIG, calibration=calibration, progress=False
    )
    assert_same(tmp_path / "quantized", in_memory(tmp_path / "float", tmp_path / "expected", CONFIG, calibration))


class Killed(BaseException):
    pass


BOTH = {"asymmetric_targets": True, "finetune_epochs": 2}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"finetune_epochs": 2}),
        ("LlamaForCausalLM", {"asymmetric_targets": True}),
        ("LlamaForCausalLM", BOTH),
        ("LlamaForCausalLM", {"asymmetric_targets": True, "initial_codes": "best"}),
        ("Gemma2ForCausalLM", {}),
        ("Gemma2ForCausalLM", BOTH),
        ("MixtralForCausalLM", {}),
        ("MixtralForCausalLM", {"finetune_epochs": 2}),
    ],
)
def test_stopped_after_each_block_it_ends_with_the_same_files(name, fields, tmp_path, monkeypatch):
    model = saved(tmp_path / "float", name)
    calibration = calibration_for(model, **fields)
    options = {"calibration": calibration, "progress": False}
    pql.quantize_checkpoint(tmp_path / "float", tmp_path / "expected", CONFIG, **options)
    assert_same(tmp_path / "expected", in_memory(tmp_path / "float", tmp_path / "memory", CONFIG, calibration))
    own, done = checkpoint_parts.PartsOfModel.keep, []

    def keep(self, work, number):
        own(self, work, number)
        done.append(number)
        raise Killed

    n_stops = 0
    while True:
        monkeypatch.setattr(checkpoint_parts.PartsOfModel, "keep", keep)
        try:
            pql.quantize_checkpoint(tmp_path / "float", tmp_path / "quantized", CONFIG, **options)
            break
        except Killed:
            n_stops += 1
            assert n_stops < 20
    assert n_stops == len(set(done)) > 2  # nothing is made twice
    assert files_of(tmp_path / "quantized") == files_of(tmp_path / "expected")


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM"])
def test_one_block_is_in_memory_at_a_time_and_none_before_and_after(name, tmp_path, monkeypatch):
    model = saved(tmp_path / "float", name)
    n_blocks = len(model.model.layers)
    seen = []
    own = folder_blocks.FolderBlocks.opened

    def opened(self, block):
        def here():
            layers = self.model.model.layers
            return [i for i in range(n_blocks) if any(not p.is_meta for p in layers[i].parameters())]

        seen.append(here())
        inner = own(self, block)

        class Watched:
            def __enter__(self):
                module = inner.__enter__()
                seen.append(here())
                return module

            def __exit__(self, *exception):
                result = inner.__exit__(*exception)
                seen.append(here())
                return result

        return Watched()

    monkeypatch.setattr(folder_blocks.FolderBlocks, "opened", opened)
    calibration = calibration_for(model)
    pql.quantize_checkpoint(
        tmp_path / "float", tmp_path / "quantized", CONFIG, calibration=calibration, progress=False
    )
    assert seen == [state for i in range(n_blocks) for state in ([], [i], [])]


def test_killed_at_any_file_operation_it_ends_with_the_same_files(tmp_path):
    saved(tmp_path / "float")
    calibration = pql.Calibration(data=IDS, n_tokens=256, sequence_length=64)

    def run(folder):
        pql.quantize_checkpoint(tmp_path / "float", folder, CONFIG, calibration=calibration, progress=False)

    run(tmp_path / "expected")
    folders = folders_of_killed_runs(run, tmp_path / "all", int(os.environ.get("KILLS", "4")), seed=1)
    assert folders
    assert all(files_of(each) == files_of(tmp_path / "expected") for each in folders)


def test_other_data_is_another_run(tmp_path, monkeypatch):
    saved(tmp_path / "float")
    own = folder_blocks.FolderBlocks.opened

    def opened(self, block):
        if block != self.blocks[0]:
            raise Killed
        return own(self, block)

    monkeypatch.setattr(folder_blocks.FolderBlocks, "opened", opened)
    with pytest.raises(Killed):
        pql.quantize_checkpoint(tmp_path / "float", tmp_path / "q", CONFIG, calibration=IDS, progress=False)
    with pytest.raises(FileExistsError, match="other values of calibration"):
        pql.quantize_checkpoint(tmp_path / "float", tmp_path / "q", CONFIG, calibration=IDS.flip(0), progress=False)


def test_what_calibration_cannot_do_is_refused_before_anything_is_written(tmp_path):
    saved(tmp_path / "float")
    for config, calibration, match in (
        (pql.HQQConfig(axis=0, group_size=16), IDS, "axis=1"),
        (CONFIG, IDS[:20], "at least 128"),
        (CONFIG, pql.Calibration(data=IDS, resume_folder=tmp_path / "resume"), "leave resume_folder out"),
    ):
        with pytest.raises(ValueError, match=match):
            pql.quantize_checkpoint(
                tmp_path / "float", tmp_path / "q", config, calibration=calibration, progress=False
            )
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("way", ["files", "in memory"])
def test_the_float_weights_of_finished_blocks_are_gone(way, tmp_path):
    folder = tmp_path / "float"
    model = saved(folder)
    shape, alive = tuple(model.model.layers[0].mlp.down_proj.weight.shape), []
    given = calibration_for(model)

    def count(result):
        if result.name.endswith("down_proj"):  # the last one of its block
            gc.collect()
            found = (each for each in gc.get_objects() if type(each) is torch.nn.Parameter)
            alive.append(sum(tuple(each.shape) == shape and not each.is_meta for each in found))

    if way == "files":
        del model
        pql.quantize_checkpoint(folder, tmp_path / "out", CONFIG, calibration=given, progress=False, on_layer=count)
        assert alive[1] == alive[0]
    else:
        pql.quantize_model(model, CONFIG, calibration=given, progress=False, on_layer=count)
        assert alive[1] == alive[0] - 1


def test_freed_memory_goes_back_before_each_group_of_layers(tmp_path, monkeypatch):
    model = saved(tmp_path / "float")
    events = []
    own = QuantizeVisitor.visit_group
    monkeypatch.setattr(calibrated, "return_free_memory", lambda: events.append("returned"))
    monkeypatch.setattr(
        QuantizeVisitor, "visit_group", lambda self, group: (events.append(group.names[0]), own(self, group))[1]
    )
    pql.quantize_checkpoint(
        tmp_path / "float", tmp_path / "out", CONFIG, calibration=calibration_for(model), progress=False
    )
    assert events[::2] == ["returned"] * (len(events) // 2)
    assert len(events) == 2 * 4 * 2  # two blocks: what q, k and v read, o, gate and up, down
