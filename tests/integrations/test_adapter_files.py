"""Adapters whose files are damaged, or do not fit their config, are refused with the file's name.

The model is as it was then, through every door that an adapter comes in by.
"""

import copy
import json
import math
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from mistakes import assert_unchanged, bits
from peft import LoraConfig, PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.formats.checksums import METADATA_KEY, SWITCH
from peft_quantlayers.integrations.adapter_files import check_file

from .tiny import tiny_model, token_ids

FILE = "adapter_model.safetensors"
KINDS = ("lora", "qalora", "aware", "scales")


@cache
def quantized_once() -> nn.Module:
    return pql.quantize_model(tiny_model(), pql.HQQConfig(nbits=4, group_size=16, iters=1), progress=False)


def quantized() -> nn.Module:
    return copy.deepcopy(quantized_once())


def adapter(kind: str) -> PeftModel:
    if kind == "scales":
        config = pql.QuantScalesConfig(train=("scales", "zeros", "norms"))
    else:
        qalora = {"use_qalora": True, "qalora_group_size": 16} if kind == "qalora" else {}
        config = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False, **qalora)
    base = quantized()
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    if kind == "aware":
        pql.enable_merge_aware(model)
    return model.eval()


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    adapter(kind).save_pretrained(tmp_path / kind)
    return tmp_path / kind


def load(folder) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(quantized(), folder)


def edit_tensors(folder, change) -> None:
    tensors = load_file(folder / FILE)
    save_file(change(tensors), folder / FILE, metadata={"format": "pt"})


def edit_config(folder, **fields) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def onto_the_model(folder) -> tuple[nn.Module, Callable[[], object]]:
    model = quantized()
    return model, lambda: PeftModel.from_pretrained(model, folder)


def onto_a_mixed_model(folder) -> tuple[nn.Module, Callable[[], object]]:
    model = quantized()
    return model, lambda: PeftMixedModel.from_pretrained(model, folder)


def beside_another_adapter(folder) -> tuple[nn.Module, Callable[[], object]]:
    model = get_peft_model(quantized(), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    return model, lambda: model.load_adapter(folder, "second")


def over_the_same_adapter(folder) -> tuple[nn.Module, Callable[[], object]]:
    model = get_peft_model(quantized(), LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    return model, lambda: model.load_adapter(folder, "default")


def by_transformers(folder) -> tuple[nn.Module, Callable[[], object]]:
    model = quantized()
    return model, lambda: model.load_adapter(str(folder))


Door = Callable[[Path], tuple[nn.Module, Callable[[], object]]]
READING_THE_CONFIG: dict[str, tuple[Door, ...]] = {
    "lora": (onto_the_model, onto_a_mixed_model, beside_another_adapter, by_transformers)
}
ALL = {"lora": (*READING_THE_CONFIG["lora"], over_the_same_adapter)}


def assert_refused(
    folder: Path, error: type[Exception], match: str, *, doors: dict[str, tuple[Door, ...]] = ALL
) -> None:
    for door in doors.get(folder.name, (onto_the_model, by_transformers)):
        model, load_it = door(folder)
        before, had = bits(model), attributes(model)
        with pytest.raises(error, match=match):
            load_it()
        assert_unchanged(model, before)
        assert attributes(model) == had, door.__name__


def attributes(model: nn.Module) -> list[str]:
    """What each module has, in words: names of attributes, and keys of PEFT's tables in it."""
    return [
        f"{name}.{key} {sorted(map(str, value)) if isinstance(value, dict | set) else ''}"
        for name, module in model.named_modules()
        for key, value in sorted(vars(module).items())
    ]


def test_an_intact_adapter_loads_as_it_was(kind, folder):
    with torch.no_grad():
        expected = adapter(kind)(token_ids()).logits
        assert torch.equal(load(folder)(token_ids()).logits, expected)


def test_a_missing_tensor(folder):
    edit_tensors(folder, lambda tensors: dict(list(tensors.items())[1:]))
    assert_refused(folder, ValueError, rf"{FILE} lacks 1 tensor")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_tensor_that_is_not_finite(value, folder):
    def spoil(tensors):
        next(iter(tensors.values())).view(-1)[0] = value
        return tensors

    edit_tensors(folder, spoil)
    assert_refused(folder, ValueError, rf"{FILE}: .* holds NaN or Inf")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_a_tensor_of_integers(dtype, folder):
    def relabel(tensors):
        name = next(name for name in tensors if "lora_B" in name or "scale" in name)
        return tensors | {name: tensors[name].to(dtype)}

    edit_tensors(folder, relabel)
    assert_refused(folder, ValueError, rf"{FILE}: .* and no floats")


@pytest.mark.parametrize("length", [0, 100, -1])
def test_a_truncated_file(length, folder):
    file = folder / FILE
    file.write_bytes(file.read_bytes()[:length])
    assert_refused(folder, ValueError, rf"{FILE} is damaged or incomplete")


def test_a_tensor_of_another_shape(folder):
    edit_tensors(folder, lambda tensors: tensors | {name: tensors[name][:1] for name in list(tensors)[:1]})
    assert_refused(folder, RuntimeError, rf"(?s){FILE}: .*(size mismatch|ignore_mismatched_sizes)")


@pytest.mark.parametrize("kind", ["aware"], indirect=True)
def test_a_config_that_lost_its_targets(folder):
    edit_config(folder, target_modules=None)
    assert_refused(folder, ValueError, rf"{FILE} holds .* for which adapter_config.json has no place")


@pytest.mark.parametrize("kind", ["scales"], indirect=True)
def test_a_config_that_lost_what_is_trained(folder):
    file = folder / "adapter_config.json"
    fields = json.loads(file.read_text())
    del fields["train"]
    file.write_text(json.dumps(fields))
    assert_refused(folder, ValueError, r"for which adapter_config.json has no place")


@pytest.mark.parametrize("kind", ["lora", "qalora", "aware"], indirect=True)
@pytest.mark.parametrize("alpha", [math.nan, "8", None])
def test_an_alpha_that_is_no_number(alpha, folder):
    edit_config(folder, lora_alpha=alpha)
    assert_refused(folder, ValueError, r"lora_alpha=.* must be a finite number", doors=READING_THE_CONFIG)
    edit_config(folder, lora_alpha=8, alpha_pattern={"q_proj": alpha})
    assert_refused(folder, ValueError, r"alpha_pattern.*q_proj.* must be a finite number", doors=READING_THE_CONFIG)


@pytest.mark.parametrize("kind", ["lora"], indirect=True)
def test_a_second_adapter_is_checked_too(folder):
    model = load(folder)
    edit_tensors(folder, lambda tensors: dict(list(tensors.items())[1:]))
    with pytest.raises(ValueError, match=rf"{FILE} lacks 1 tensor"):
        model.load_adapter(folder, "second")


# ---- checksums


def bits_flipped(folder, name: str | None = None) -> str:
    """Flip a bit of one tensor, whose name is returned; the header stays."""
    file = folder / FILE
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = name or sorted(tensors)[len(tensors) // 2]
    tensors[name].view(torch.uint8).view(-1)[0] ^= 1
    save_file(tensors, file, metadata=metadata)
    return name


def test_a_flipped_bit_is_found_by_name(folder):
    name = bits_flipped(folder)
    assert_refused(folder, ValueError, rf"(?s){FILE} is damaged.*{name}: does not have the checksum")
    assert [damage.name for damage in pql.verify_model(folder)] == [name]


@pytest.mark.parametrize("kind", ["lora"], indirect=True)
def test_a_hotswapped_adapter_is_checked_too(folder):
    model = load(folder)
    before = bits(model)
    hotswap_adapter(model, str(folder), "default")
    assert_unchanged(model, before)
    name = bits_flipped(folder)
    with pytest.raises(ValueError, match=f"{name}: does not have the checksum"):
        hotswap_adapter(model, str(folder), "default")
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", ["lora"], indirect=True)
def test_swapped_and_missing_tensors_are_found(folder):
    file = folder / FILE
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    first, second = (name for name in tensors if "up_proj.lora_A" in name)
    save_file(tensors | {first: tensors[second], second: tensors[first]}, file, metadata=metadata)
    assert_refused(folder, ValueError, r"2 tensor\(s\)")
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, file, metadata=metadata)
    assert_refused(folder, ValueError, "is missing")


@pytest.mark.parametrize("kind", ["lora"], indirect=True)
def test_files_without_checksums_load_and_the_environment_switches_them_off(folder, tmp_path, monkeypatch):
    expected = load(folder)(token_ids()).logits
    save_file(load_file(folder / FILE), folder / FILE, metadata={"format": "pt"})  # as PEFT alone writes it
    assert torch.equal(load(folder)(token_ids()).logits, expected)
    load(folder).save_pretrained(tmp_path / "again")
    bits_flipped(tmp_path / "again")
    monkeypatch.setenv(SWITCH, "1")
    load(tmp_path / "again").save_pretrained(tmp_path / "without")
    with safe_open(tmp_path / "without" / FILE, framework="pt") as opened:
        assert METADATA_KEY not in opened.metadata()


@pytest.mark.parametrize("kind", ["lora"], indirect=True)
def test_peft_alone_loads_a_file_with_checksums(folder):
    expected = load(folder)(token_ids()).logits
    pql.unregister()
    try:
        assert "checksum" not in str(PeftConfig.from_pretrained(folder).to_dict())
        PeftModel.from_pretrained(tiny_model(), folder)
    finally:
        pql.register()
    assert torch.equal(load(folder)(token_ids()).logits, expected)


def test_every_adapter_of_a_model_and_what_is_saved_beside_it_has_checksums(tmp_path):
    model = get_peft_model(quantized(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.add_adapter("second", LoraConfig(target_modules=["v_proj"], bias="all"))
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "second"):
        assert pql.verify_model(folder) == []
        for name in load_file(folder / FILE):
            shutil.copytree(folder, tmp_path / "copy")
            bits_flipped(tmp_path / "copy", name)
            assert [damage.name for damage in pql.verify_model(tmp_path / "copy")] == [name]
            shutil.rmtree(tmp_path / "copy")


@pytest.mark.parametrize("in_peft_format", [True, False])
def test_transformers_writes_them_too(in_peft_format, tmp_path):
    model = quantized()
    model.add_adapter(LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path, save_peft_format=in_peft_format)
    assert pql.verify_model(tmp_path) == []
    if in_peft_format:
        assert torch.equal(load(tmp_path)(token_ids()).logits, model(token_ids()).logits)
    name = bits_flipped(tmp_path)
    assert [damage.name for damage in pql.verify_model(tmp_path)] == [name]
    with pytest.raises(ValueError, match=name):
        quantized().load_adapter(str(tmp_path))


def test_adapters_on_quantized_experts_are_checked_too(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 128}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    skipped = pql.HQQConfig(group_size=16, iters=1, skip_modules=["self_attn"])
    base = pql.quantize_model(MixtralForCausalLM(config), skipped, progress=False)
    assert not pql.quantized_modules(base)
    lora = LoraConfig(target_modules=[], target_parameters=["mlp.experts.gate_up_proj"], r=2)
    get_peft_model(copy.deepcopy(base), lora).save_pretrained(tmp_path)
    assert pql.verify_model(tmp_path) == []
    PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    name, before, had = bits_flipped(tmp_path), bits(base), attributes(base)
    with pytest.raises(ValueError, match=name):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)
    assert attributes(base) == had


# ---- the config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is damaged"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "does not name a method"),
        ('{"peft_type": "NO_SUCH"}', "does not name a method"),
        ('{"peft_type": ["LORA"]}', "does not name a method"),
        ("[" * 100_000, "is damaged"),
        ('{"peft_type": "LORA", "r": "two"}', ""),
        ('{"peft_type": "LORA", "r": 0, "target_modules": ["q_proj"]}', ""),
        ('{"peft_type": "LORA", "target_modules": 5}', ""),
        ('{"peft_type": "LORA", "target_modules": ["nowhere"]}', ""),
        ('{"peft_type": "LORA", "use_dora": "yes", "layers_to_transform": [1], "target_modules": "q"}', ""),
        ('{"peft_type": "QUANT_SCALES", "train": "scales"}', "adapter_config.json"),
        ('{"peft_type": "QUANT_SCALES", "train": 5}', "adapter_config.json"),
    ],
)
def test_a_config_that_is_none_is_refused_with_its_name(text, said, tmp_path):
    adapter("lora").save_pretrained(tmp_path / "onto")
    (tmp_path / "onto" / "adapter_config.json").write_text(text)
    for door in (onto_the_model, beside_another_adapter, by_transformers):
        model, load_it = door(tmp_path / "onto")
        before, had = bits(model), attributes(model)
        with pytest.raises(Exception, match=said) as refused:
            load_it()
        words = "\n".join([str(refused.value), *getattr(refused.value, "__notes__", ())])
        assert str(tmp_path / "onto") in words
        assert_unchanged(model, before)
        assert attributes(model) == had, door.__name__


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_writes_to_the_base_is_undone_too(init, tmp_path):
    model = get_peft_model(quantized(), LoraConfig(target_modules=["q_proj", "up_proj"], r=2, init_lora_weights=init))
    model.save_pretrained(tmp_path / "lora")
    edit_tensors(tmp_path / "lora", lambda tensors: dict(list(tensors.items())[1:]))
    assert_refused(tmp_path / "lora", ValueError, "lacks 1 tensor", doors=READING_THE_CONFIG)


def test_an_adapter_that_cannot_be_added_leaves_the_model_as_it_was():
    model = get_peft_model(quantized(), pql.QuantScalesConfig(target_modules=["v_proj"]))
    before, had = bits(model.base_model.model), attributes(model.base_model.model)
    with pytest.raises(ValueError, match="LoRA on top of tuned scales"):
        get_peft_model(model.base_model.model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert_unchanged(model.base_model.model, before)
    assert attributes(model.base_model.model) == had


# ---- the record of the base


@pytest.mark.parametrize(
    "door",
    [
        PeftModel.from_pretrained,
        lambda model, folder: model.load_adapter(str(folder)),
        lambda model, folder: PeftModel.from_pretrained(model, folder, config=PeftConfig.from_pretrained(folder)),
    ],
    ids=["peft", "transformers", "config"],
)
def test_another_base_is_said(door, tmp_path):
    folder = tmp_path / "lora"
    adapter("lora").save_pretrained(folder)
    other = pql.quantize_model(tiny_model(), pql.HQQConfig(nbits=3, group_size=16), progress=False)
    with pytest.warns(UserWarning, match="trained on the quantized base"):
        door(other, folder)


@pytest.mark.parametrize("kind", ["lora"], indirect=True)
def test_a_model_without_our_layers_is_left_to_peft(folder, tmp_path):
    edit_tensors(folder, lambda tensors: dict(list(tensors.items())[1:]))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(tiny_model(), folder)


def test_a_scalar_among_an_adapters_own_tensors_is_checked_by_its_dtype(tmp_path):
    file = tmp_path / FILE
    save_file({"a.lora_scale": torch.tensor(1.0)}, file)
    check_file(file)
    save_file({"a.lora_scale": torch.tensor(True)}, file)
    with pytest.raises(ValueError, match=r"a\.lora_scale holds torch\.bool and no floats"):
        check_file(file)


def test_an_adapter_whose_file_holds_a_scalar_is_loaded(tmp_path):
    """A trained copy of a batch norm counts its batches."""

    def model() -> nn.Module:
        layers = nn.Sequential(OrderedDict(linear=nn.Linear(32, 32), norm=nn.BatchNorm1d(32)))
        return pql.quantize_model(layers, pql.HQQConfig(nbits=4, group_size=16), progress=False)

    config = LoraConfig(target_modules=["linear"], modules_to_save=["norm"], r=2)
    trained = get_peft_model(model(), config)
    trained.base_model.model.norm.modules_to_save["default"].num_batches_tracked.fill_(7)
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model(), tmp_path)
    assert loaded.base_model.model.norm.modules_to_save["default"].num_batches_tracked == 7
