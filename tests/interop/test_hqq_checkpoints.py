"""Checkpoints of the ``hqq`` package read back: codes, scales and zeros as they were, and what is damaged refused."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq_models import (
    float_model,
    package_codes,
    package_layers,
    package_model,
    safetensors_entries,
    save_like_the_package,
    save_like_transformers_4,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, HqqConfig, LlamaConfig, LlamaForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.formats.published_hqq import describe_hqq_layer, flattened
from peft_quantlayers.integrations import described_layers
from peft_quantlayers.methods import spec_from_dict
from quantlayers_kernels.bitpack import unpack

WIDTHS = [8, 6, 5, 4, 3, 2, 1.58, 1]
STORED_AS = {1.58: 2}
IDS = torch.arange(24)[None]
LAYER = "model.layers.1.mlp.up_proj"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def from_safetensors(model: nn.Module, folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(save_like_transformers_4(model, folder))


def from_shards(model: nn.Module, folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(save_like_transformers_4(model, folder, n_files=3))


def from_package_folder(model: nn.Module, folder: Path) -> nn.Module:
    return pql.load_hqq_folder(save_like_the_package(model, folder))


Route = Callable[[nn.Module, Path], nn.Module]
ROUTES: list[Route] = [from_safetensors, from_shards, from_package_folder]
routes = pytest.mark.parametrize("route", ROUTES)
axes = pytest.mark.parametrize("axis", [0, 1])


def assert_same_tensors(loaded: nn.Module, model: nn.Module, nbits: float) -> None:
    """Every code, scale, zero, bias and float parameter is that of the package's model."""
    ours, theirs = pql.quantized_modules(loaded), package_layers(model)
    assert set(ours) == set(theirs)
    for name, layer in ours.items():
        peer = theirs[name]
        assert layer.spec.nbits == STORED_AS.get(nbits, nbits)
        assert torch.equal(unpack(layer.W_q.data, layer.spec.nbits, layer.in_features), package_codes(peer))
        assert torch.equal(layer.bias, peer.bias) if peer.bias is not None else layer.bias is None
        if layer.spec.group_size == peer.meta["group_size"]:
            for part in ("scale", "zero"):
                assert torch.equal(getattr(layer, part).flatten(), peer.meta[part].flatten())
                assert getattr(layer, part).dtype == peer.meta[part].dtype
    floats = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in theirs}
    for name, tensor in floats.items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def assert_same_weights(loaded: nn.Module, model: nn.Module) -> None:
    """Dequantized: equal to the bit in float32; in half precision within the rounding of both.

    The package rounds code - zero and the product, we round once: 3/2 epsilon of the weight together.
    """
    for name, peer in package_layers(model).items():
        layer, expected = pql.quantized_modules(loaded)[name], peer.dequantize()
        assert layer.compute_dtype == expected.dtype
        found = layer.dequantize()
        if expected.dtype == torch.float32:
            assert torch.equal(found, expected)
        else:
            eps, tiny = torch.finfo(expected.dtype).eps, torch.finfo(expected.dtype).smallest_normal
            bound = 1.51 * eps * expected.float().abs() + eps * tiny
            assert ((found.float() - expected.float()).abs() <= bound).all()


@routes
@axes
@pytest.mark.parametrize("nbits", WIDTHS)
def test_every_width_reads_back_to_the_bit(nbits: float, axis: int, route: Route, tmp_path: Path) -> None:
    model = package_model(nbits, axis)
    loaded = route(model, tmp_path / "model")
    assert_same_tensors(loaded, model, nbits)
    assert_same_weights(loaded, model)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("route", [from_safetensors, from_package_folder])
@axes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nbits", [8, 4, 3, 1])
def test_half_precision_checkpoints_keep_their_tensors(
    nbits: int, dtype: torch.dtype, axis: int, route: Route, tmp_path: Path
) -> None:
    model = package_model(nbits, axis, dtype=dtype)
    loaded = route(model, tmp_path / "model")
    assert loaded.dtype == dtype
    assert_same_tensors(loaded, model, nbits)
    assert_same_weights(loaded, model)


@pytest.mark.parametrize("route", [from_shards, from_package_folder])
@axes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nbits", [4, 3])
def test_codes_viewed_as_floats_read_back(
    nbits: int, dtype: torch.dtype, axis: int, route: Route, tmp_path: Path
) -> None:
    model = package_model(nbits, axis, dtype=dtype, view_as_float=True)
    loaded = route(model, tmp_path / "model")
    assert_same_tensors(loaded, model, nbits)


@pytest.mark.parametrize("route", [from_safetensors, from_package_folder])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_groups_that_run_over_the_end_of_a_row_read_back_to_the_bit(nbits: int, route: Route, tmp_path: Path) -> None:
    model = package_model(nbits, axis=1, hidden_size=96)
    loaded = route(model, tmp_path / "model")
    assert loaded.model.layers[0].self_attn.q_proj.spec.group_size == 32
    assert loaded.model.layers[0].mlp.down_proj.spec.group_size == 64
    assert_same_tensors(loaded, model, nbits)
    assert_same_weights(loaded, model)


@pytest.mark.parametrize("route", [from_safetensors, from_package_folder])
def test_groups_that_mix_columns_are_refused_by_name(route: Route, tmp_path: Path) -> None:
    model = package_model(4, axis=0, hidden_size=96)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.(self_attn|mlp)\.\w+: with axis=0, group_size=64"):
        route(model, tmp_path / "model")


@routes
def test_tied_embeddings_stay_tied(route: Route, tmp_path: Path) -> None:
    model = package_model(is_tied=True)
    loaded = route(model, tmp_path / "model")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same_tensors(loaded, model, 4)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)


@routes
@pytest.mark.parametrize(("nbits", "dtype"), [(4, torch.float32), (3, torch.bfloat16), (1.58, torch.float16)])
def test_a_loaded_model_saves_and_loads_as_ours(
    nbits: float, dtype: torch.dtype, route: Route, tmp_path: Path
) -> None:
    loaded = route(package_model(nbits, dtype=dtype, is_tied=True), tmp_path / "model")
    loaded.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.config.quantization_config.quant_method == "quantlayers"
    expected = loaded.state_dict()
    assert set(again.state_dict()) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)


@pytest.mark.parametrize("n_files", [1, 3])
def test_nothing_is_reported_missing_or_unexpected(n_files: int, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    folder = save_like_transformers_4(package_model(), tmp_path / "model", n_files=n_files)
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    said = "".join(capfd.readouterr())
    assert not any(word in said for word in ("MISSING", "UNEXPECTED", "MISMATCH", "initialized"))


def test_layers_are_built_once_with_their_real_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_like_transformers_4(package_model(5), tmp_path / "model")
    placed = {}
    place = described_layers.place_empty_layer

    def record(model: nn.Module, name: str, spec: pql.QuantSpec, **kwargs) -> pql.QuantizedLinear:
        layer = place(model, name, spec, **kwargs)
        placed[name] = (layer, layer.spec)
        return layer

    monkeypatch.setattr(described_layers, "place_empty_layer", record)
    loaded = pql.quantized_modules(AutoModelForCausalLM.from_pretrained(folder))
    assert set(loaded) == set(placed)
    for name, layer in loaded.items():
        assert layer is placed[name][0]
        assert layer.spec == placed[name][1]
        assert layer.spec.nbits == 5


def test_the_base_model_of_a_checkpoint_loads_without_its_head(tmp_path: Path) -> None:
    model = package_model(4)
    base = AutoModel.from_pretrained(save_like_transformers_4(model, tmp_path / "model"))
    theirs = package_layers(model)
    assert {f"model.{name}" for name in pql.quantized_modules(base)} == set(theirs)
    for name, layer in pql.quantized_modules(base).items():
        assert torch.equal(layer.dequantize(), theirs[f"model.{name}"].dequantize())


def test_parameters_of_other_modules_that_are_called_scale_are_read_as_they_are(tmp_path: Path) -> None:
    """The conversion takes the tensors of quantized layers and no others, and does not keep their dtype."""
    model = package_model(4)
    entries = safetensors_entries(model) | {"model.norm.scale": torch.full((3,), 7.0, dtype=torch.float16)}
    folder = save_like_transformers_4(model, tmp_path / "model", entries=entries)

    class WithScale(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.model.norm.scale = nn.Parameter(torch.zeros(3))

    loaded = WithScale.from_pretrained(folder)
    assert torch.equal(loaded.model.norm.scale, torch.full((3,), 7.0))
    assert loaded.model.norm.scale.dtype == torch.float32
    assert_same_tensors(loaded, model, 4)


@routes
def test_lora_trains_on_a_loaded_model_and_merges_back(route: Route, tmp_path: Path) -> None:
    loaded = route(package_model(8), tmp_path / "model")
    peft_model = get_peft_model(loaded, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    assert isinstance(peft_model.base_model.model.model.layers[0].mlp.up_proj, pql.LoraQuantizedLinear)
    peft_model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.1)
        expected = peft_model(IDS).logits
        merged = peft_model.merge_and_unload()
        assert set(pql.quantized_modules(merged)) == set(pql.quantized_modules(loaded))
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=0, atol=0.02)


# ---- the folder of the package


def test_dtype_and_device_of_a_folder_can_be_chosen(tmp_path: Path) -> None:
    model = package_model(4)
    folder = save_like_the_package(model, tmp_path / "model")
    loaded = pql.load_hqq_folder(folder, dtype=torch.bfloat16, device="cpu")
    layer = loaded.model.layers[0].mlp.up_proj
    assert loaded.dtype == layer.compute_dtype == layer.dequantize().dtype == torch.bfloat16
    assert layer.scale.dtype == torch.float32  # codes, scales and zeros are those of the file
    assert torch.equal(
        layer.dequantize(torch.float32), package_layers(model)["model.layers.0.mlp.up_proj"].dequantize()
    )
    assert not loaded.training


class _RunsCode:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    folder = save_like_the_package(package_model(), tmp_path / "model")
    torch.save({"model.norm": {"weight": _RunsCode(tmp_path / "witness")}}, folder / "qmodel.pt")
    with pytest.raises(ValueError, match=r"qmodel\.pt was not read.*may run code"):
        pql.load_hqq_folder(folder)
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda modules: [1, 2], "does not map module names"),
        (lambda modules: {name: entries for name, entries in modules.items() if "W_q" not in entries}, "no W_q"),
        (lambda modules: {name: entries for name, entries in modules.items() if name != "model.norm"}, "model.norm"),
        (lambda modules: {name: entries for name, entries in modules.items() if name != LAYER}, LAYER),
        (lambda modules: modules | {"model.extra": modules["model.norm"]}, "model.extra"),
        (lambda modules: modules | {"model.layers.7.mlp.up_proj": modules[LAYER]}, "model.layers.7.mlp.up_proj"),
        (lambda modules: modules | {"model.norm": {"weight": torch.ones(3)}}, "model.norm"),
        (lambda modules: modules | {LAYER: modules["model.layers.0.mlp.down_proj"]}, LAYER),
    ],
)
def test_a_folder_that_does_not_fit_its_config_is_refused_by_name(
    change: Callable, message: str, tmp_path: Path
) -> None:
    folder = save_like_the_package(package_model(), tmp_path / "model")
    torch.save(change(torch.load(folder / "qmodel.pt", weights_only=True)), folder / "qmodel.pt")
    with pytest.raises(ValueError, match=message):
        pql.load_hqq_folder(folder)


@pytest.mark.parametrize("kept", [0, 100, 20_000])
def test_a_truncated_folder_is_refused(kept: int, tmp_path: Path) -> None:
    file = save_like_the_package(package_model(), tmp_path / "model") / "qmodel.pt"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"qmodel\.pt.*damaged"):
        pql.load_hqq_folder(file.parent)


def test_a_folder_without_its_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json and qmodel\.pt"):
        pql.load_hqq_folder(tmp_path)


# ---- layouts of older releases: quantized or stacked metadata, in the pickle only


def older_layer(*, quant_scale: bool, quant_zero: bool, nbits: int = 4, dtype: torch.dtype) -> HQQLinear:
    """HQQLinear ignores quantized metadata since 0.2, its ``quantize`` still honours it."""
    settings = BaseQuantizeConfig(nbits=nbits, group_size=64, quant_scale=quant_scale, quant_zero=quant_zero)
    layer = HQQLinear(None, settings, compute_dtype=dtype, device="cpu", initialize=False)
    layer.quantize(torch.randn(128, 256) * 0.02, **layer.quant_config)
    layer.encoded_state_dict = False
    return layer


def dequantized(stored: dict) -> Tensor:
    entries = flattened(stored, name="layer")
    layer = describe_hqq_layer(entries, name="layer", spec_from_dict=spec_from_dict)
    W_q, scale, zero = (layer.convert(part, entries[part]) for part in layer.tensor_names)
    groups = unpack(W_q, layer.spec.nbits, layer.shape[1]).float().view(*scale.shape, layer.spec.group_size)
    return ((groups - zero[..., None].float()) * scale[..., None].float()).reshape(layer.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("quant_scale", "quant_zero"), [(True, True), (True, False), (False, True)])
def test_quantized_metadata_reads_as_the_package_reads_it(
    quant_scale: bool, quant_zero: bool, dtype: torch.dtype
) -> None:
    layer = older_layer(quant_scale=quant_scale, quant_zero=quant_zero, dtype=dtype)
    found, expected = dequantized(layer.state_dict()), layer.dequantize().float()
    bound = 1.51 * torch.finfo(dtype).eps * expected.abs()
    assert ((found - expected).abs() <= (0 if dtype == torch.float32 else bound)).all()


@pytest.mark.parametrize("is_quantized", [False, True])
def test_stacked_metadata_reads_as_the_package_reads_it(is_quantized: bool) -> None:
    """``offload_meta``; the package itself cannot make it without a GPU, but reads it."""
    layer = older_layer(quant_scale=False, quant_zero=False, dtype=torch.float32)
    if is_quantized:
        settings = {"nbits": 8, "channel_wise": True, "group_size": 128, "optimize": False}
        layer = HQQLinear(None, {"offload_meta": False}, compute_dtype=torch.float32, device="cpu", initialize=False)
        weight_settings = BaseQuantizeConfig(nbits=4, group_size=64)["weight_quant_params"]
        layer.quantize(torch.randn(128, 256) * 0.02, weight_settings, settings, settings)
    parts = ("zero_q", "scale_q") if is_quantized else ("zero", "scale")
    expected = layer.dequantize().clone()
    layer.meta["zero_scale"] = torch.stack([layer.meta.pop(part) for part in parts])
    assert torch.equal(layer.dequantize(), expected)
    assert torch.equal(dequantized({"W_q": layer.W_q.data, **layer.meta}), expected)
    assert torch.equal(dequantized({"W_q": layer.W_q.data, "meta": layer.meta}), expected)


def test_an_older_folder_loads(tmp_path: Path) -> None:
    model = package_model()
    folder = save_like_the_package(model, tmp_path / "model")
    modules = torch.load(folder / "qmodel.pt", weights_only=True)
    for entries in modules.values():
        if "W_q" in entries:
            names = [name for name in entries if name not in ("W_q", "bias")]
            entries["meta"] = {name: entries.pop(name) for name in names}
    torch.save(modules, folder / "qmodel.pt")
    loaded = pql.load_hqq_folder(folder)
    assert_same_tensors(loaded, model, 4)
    assert_same_weights(loaded, model)


# ---- damaged layers, on both routes


def _set(entry: str, value: object) -> Callable[[dict], None]:
    return lambda stored: stored.__setitem__(entry, value)


def _poison(part: str) -> Callable[[dict], None]:
    def poison(stored: dict) -> None:
        stored[part] = stored[part].clone()
        stored[part].view(-1)[3] = math.nan if part == "scale" else math.inf

    return poison


DAMAGE = {
    "missing scale": (lambda stored: stored.pop("scale"), "scale"),
    "missing zero": (lambda stored: stored.pop("zero"), "zero"),
    "missing axis": (lambda stored: stored.pop("axis"), "axis"),
    "missing shape": (lambda stored: stored.pop("shape"), "shape"),
    "wrong packed shape": (lambda stored: _set("W_q", stored["W_q"].detach()[:-1].clone())(stored), "W_q"),
    "codes of another kind": (_set("W_q", torch.zeros(3, 5, dtype=torch.int64)), "W_q"),
    "axis 7": (_set("axis", torch.tensor(7)), "axis=7"),
    "axis of two numbers": (_set("axis", torch.tensor([0, 1])), "axis"),
    "unknown packing": (_set("packing", torch.tensor(list(b"7bit_u8"), dtype=torch.uint8)), "packing"),
    "shape of three": (_set("shape", torch.tensor([2, 3, 4])), "shape"),
    "another shape": (_set("shape", torch.tensor([64, 128])), "shape|scale"),
    "short scale": (_set("scale", torch.ones(5, 1)), "scale"),
    "integer zero": (_set("zero", torch.ones(128, 1, dtype=torch.int32)), "zero"),
    "NaN scale": (_poison("scale"), "scale holds NaN or Inf"),
    "infinite zero": (_poison("zero"), "zero holds NaN or Inf"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_safetensors_are_refused_by_name(damage: str, tmp_path: Path) -> None:
    model = package_model()
    entries = safetensors_entries(model)
    prefix = f"{LAYER}."
    stored = {name.removeprefix(prefix): entries.pop(name) for name in list(entries) if name.startswith(prefix)}
    change, message = DAMAGE[damage]
    change(stored)
    entries |= {prefix + name: tensor for name, tensor in stored.items()}
    folder = save_like_transformers_4(model, tmp_path / "model", entries=entries)
    with pytest.raises(ValueError, match=rf"{LAYER}.*({message})"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_layers_of_a_folder_are_refused_by_name(damage: str, tmp_path: Path) -> None:
    folder = save_like_the_package(package_model(), tmp_path / "model")
    modules = torch.load(folder / "qmodel.pt", weights_only=True)
    change, message = DAMAGE[damage]
    change(modules[LAYER])
    torch.save(modules, folder / "qmodel.pt")
    with pytest.raises(ValueError, match=rf"{LAYER}.*({message})"):
        pql.load_hqq_folder(folder)


def test_a_truncated_safetensors_file_is_refused(tmp_path: Path) -> None:
    file = save_like_transformers_4(package_model(), tmp_path / "model") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete"):
        AutoModelForCausalLM.from_pretrained(file.parent)


def test_a_checkpoint_without_codes_is_refused(tmp_path: Path) -> None:
    model = package_model()
    entries = {name: tensor for name, tensor in safetensors_entries(model).items() if not name.endswith(".W_q")}
    folder = save_like_transformers_4(model, tmp_path / "model", entries=entries)
    with pytest.raises(ValueError, match="holds no W_q tensor"):
        AutoModelForCausalLM.from_pretrained(folder)


# ---- transformers' own HqqConfig on a float model


@axes
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_hqq_config_of_transformers_quantizes_through_us(nbits: int, axis: int, tmp_path: Path) -> None:
    float_model().save_pretrained(tmp_path / "float")
    config = HqqConfig(nbits=nbits, group_size=32, axis=axis)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    ours = pql.quantize_model(float_model(), pql.HQQConfig(nbits=nbits, group_size=32, axis=axis), progress=False)
    layers = pql.quantized_modules(model)
    assert {(s.nbits, s.group_size, s.axis) for s in (layer.spec for layer in layers.values())} == {(nbits, 32, axis)}
    assert set(layers) == set(pql.quantized_modules(ours))
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_dynamic_config_leaves_all_that_it_does_not_name_float(tmp_path: Path) -> None:
    float_model().save_pretrained(tmp_path / "float")
    config = HqqConfig(
        dynamic_config={
            "self_attn.q_proj": {"nbits": 8, "group_size": 64},
            "mlp.up_proj": {"nbits": 2, "group_size": 16, "axis": 0},
        }
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    found = {name: layer.spec for name, layer in pql.quantized_modules(model).items()}
    assert {name.partition("layers.")[2][2:] for name in found} == {"self_attn.q_proj", "mlp.up_proj"}
    assert found["model.layers.1.self_attn.q_proj"].nbits == 8
    assert found["model.layers.1.mlp.up_proj"].axis == 0


def test_skip_modules_of_hqq_config_stay_float(tmp_path: Path) -> None:
    float_model().save_pretrained(tmp_path / "float")
    config = HqqConfig(nbits=4, group_size=64, skip_modules=["lm_head", "down_proj"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    names = {name.rpartition(".")[2] for name in pql.quantized_modules(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
