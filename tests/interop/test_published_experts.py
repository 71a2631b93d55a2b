"""Checkpoints of mixtures as the packages ``hqq`` and ``aqlm`` and transformers 4 wrote them: each expert's layers by
themselves."""

import copy
import json
import re
from collections import defaultdict

import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from mixtures import codes, same, tiny_mixture
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.formats.published_aqlm import SCHEME
from peft_quantlayers.integrations.expert_tensors import expert_tensors
from peft_quantlayers.methods import get_method
from quantlayers_kernels.aqlm.reference import dequantize_aqlm_reference

NAMES = {
    "qwen3_moe": ("mlp.experts", ("gate_proj", "up_proj"), "down_proj", "Qwen3MoeForCausalLM"),
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3"), "w2", "MixtralForCausalLM"),
}


def package_layer(weight: torch.Tensor, axis: int) -> HQQLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.detach().clone()
    settings = BaseQuantizeConfig(nbits=4, group_size=16, axis=axis)
    return HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu", initialize=True)


def write(folder, family: str, *, axis: int = 1) -> dict[str, torch.Tensor]:
    """The folder, and the dense weight of each stack as the package computes it."""
    folder.mkdir()
    model = tiny_mixture(family)
    inside, (gate, up), down, architecture = NAMES[family]
    entries, expected = {}, {}
    for name, tensor in model.state_dict().items():
        if ".experts." not in name:
            entries[name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if family == "mixtral" else name] = tensor
            continue
        prefix = name.partition(".mlp.experts.")[0]
        dense = []
        for expert, weight in enumerate(tensor):
            parts = zip((gate, up), weight.chunk(2), strict=True) if "gate_up" in name else [(down, weight)]
            layers = {part: package_layer(each, axis) for part, each in parts}
            for part, layer in layers.items():
                for key, value in layer.state_dict().items():
                    entries[f"{prefix}.{inside}.{expert}.{part}.{key}"] = value
            dense.append(torch.cat([layer.dequantize() for layer in layers.values()]))
        expected[name] = torch.stack(dense)
    for name in [name for name in entries if name.endswith("self_attn.q_proj.weight")]:
        for key, value in package_layer(entries.pop(name), axis).state_dict().items():
            entries[f"{name.removesuffix('.weight')}.{key}"] = value
    config = model.config.to_diff_dict() | {
        "architectures": [architecture],
        "dtype": "float32",
        "quantization_config": {
            "quant_config": BaseQuantizeConfig(nbits=4, group_size=16, axis=axis),
            "quant_method": "hqq",
            "skip_modules": ["lm_head"],
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        name: tensor.contiguous().clone() for name, tensor in entries.items() if isinstance(tensor, torch.Tensor)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return expected


@pytest.mark.parametrize("family", sorted(NAMES))
def test_single_experts_are_read_into_stacks(family, tmp_path, capfd):
    expected = write(tmp_path / "published", family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "published").eval()
    said = capfd.readouterr().err
    assert "UNEXPECTED" not in said
    assert "MISSING" not in said
    stacks = pql.quantized_stacks(model)
    assert set(stacks) == set(expected)
    for name, dense in expected.items():
        torch.testing.assert_close(stacks[name].dequantize(), dense, atol=1e-6, rtol=1e-5)
    ids = torch.arange(3, 20)[None]
    logits = model(ids).logits
    pql.save_model(model, tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(loaded(ids).logits, logits)


def as_package_folder(folder) -> None:
    """The folder as the ``hqq`` package itself saves it."""
    modules = defaultdict(dict)
    for key, tensor in load_file(folder / "model.safetensors").items():
        name, _, part = key.rpartition(".")
        modules[name][part] = tensor
    torch.save(dict(modules), folder / "qmodel.pt")
    (folder / "model.safetensors").unlink()
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if k != "quantization_config"}))


@pytest.mark.parametrize("family", sorted(NAMES))
def test_single_experts_of_the_packages_own_folder_are_read_into_stacks(family, tmp_path):
    expected = write(tmp_path / "published", family)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "published").eval()
    as_package_folder(tmp_path / "published")
    model = pql.load_hqq_folder(tmp_path / "published")
    for name, dense in expected.items():
        torch.testing.assert_close(pql.quantized_stacks(model)[name].dequantize(), dense, atol=1e-6, rtol=1e-5)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model(ids).logits, wanted(ids).logits)


@pytest.mark.parametrize("is_package_folder", [False, True])
def test_groups_over_the_rows_of_gate_and_up_are_refused(tmp_path, is_package_folder):
    write(tmp_path / "published", "qwen3_moe", axis=0)
    load = AutoModelForCausalLM.from_pretrained
    if is_package_folder:
        as_package_folder(tmp_path / "published")
        load = pql.load_hqq_folder
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj: .*cannot lie in one"):
        load(tmp_path / "published")


def test_a_missing_expert_is_named(tmp_path):
    write(tmp_path / "published", "qwen3_moe")
    file = tmp_path / "published" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if ".0.mlp.experts.2.up_proj." not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds 4, 3 quantized layers .* of model\.layers\.0\.mlp\.experts"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "published")


AQLM = {
    "2x8": pql.AQLMSpec(num_codebooks=2, nbits_per_codebook=8, in_group_size=8, rounds=0, beam=1),
    "1x16": pql.AQLMSpec(num_codebooks=1, nbits_per_codebook=16, in_group_size=8, rounds=0, beam=1),
}


def write_aqlm(folder, family: str, spec: pql.AQLMSpec) -> None:
    """Gate, up and down of each expert, with codebooks of their own, and the attention; as the package's names are."""
    model, method = tiny_mixture(family), get_method("aqlm")
    model.save_pretrained(folder)  # a float model's files keep single experts
    file = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        module = name.removesuffix(".weight")
        if re.search(r"\.experts\.\d+\.", name) or module.endswith("self_attn.o_proj"):
            tensors |= {f"{module}.{key}": value for key, value in method.quantize(tensor, spec).tensors.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    scheme = {name: getattr(spec, name) for name in SCHEME}
    fields["quantization_config"] = {"quant_method": "aqlm", **scheme, "linear_weights_not_to_quantize": []}
    (folder / "config.json").write_text(json.dumps(fields))


def dense_experts(folder, spec: pql.AQLMSpec) -> dict[str, torch.Tensor]:
    """The dequantized weight of each layer of an expert in the files, by its name there."""
    tensors = load_file(folder / "model.safetensors")
    names = {name.rpartition(".")[0] for name in tensors if re.search(r"\.experts\.\d+\..*codes$", name)}
    return {
        name: dequantize_aqlm_reference(*(tensors[f"{name}.{part}"] for part in ("codes", "codebooks", "scales")))
        for name in names
    }


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        *((family, "2x8") for family in ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v3", "glm4_moe")),
        ("mixtral", "1x16"),  # as the published Mixtral has them: codes of two bytes
    ],
)
def test_single_experts_of_aqlm_are_read_with_their_codebooks(family, scheme, tmp_path, capfd):
    write_aqlm(tmp_path / "published", family, AQLM[scheme])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "published").eval()
    said = capfd.readouterr().err
    assert "UNEXPECTED" not in said
    assert "MISSING" not in said
    expected = dense_experts(tmp_path / "published", AQLM[scheme])
    stacks = pql.quantized_stacks(model)
    n_compared = 0
    for name, stack in stacks.items():
        assert stack.spec.row_parts == (2 if name.endswith("gate_up_proj") else 1)
        for tensor in expert_tensors(model, name):
            found = stack.dequantize_expert(tensor.expert, torch.float32)[tensor.rows]
            wanted = expected[tensor.key.removesuffix(".weight")].float()
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
            n_compared += 1
    assert n_compared == len(expected) > 0
    assert isinstance(model.model.layers[0].self_attn.o_proj, pql.AQLMLinear)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = model(ids).logits
        dense = pql.dequantize_model(copy.deepcopy(model))
        torch.testing.assert_close(dense(ids).logits, logits, atol=1e-4, rtol=1e-4)
        pql.save_model(model, tmp_path / "ours")
        assert pql.verify_model(tmp_path / "ours") == []
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
        assert torch.equal(loaded(ids).logits, logits)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]["format_version"] == 7


def test_experts_of_published_aqlm_train_merge_and_come_out_as_they_came(tmp_path):
    write_aqlm(tmp_path / "published", "mixtral", AQLM["2x8"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "published")
    before = load_file(tmp_path / "published" / "model.safetensors")
    pql.export(model, tmp_path / "again", "aqlm")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    lora = LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    tuned = get_peft_model(model, lora)
    ids = torch.randint(3, 128, (2, 32), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(8):
        loss = tuned(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    unmerged = codes(tuned)
    tuned.merge_adapter()
    assert not same(codes(tuned), unmerged)
    tuned.unmerge_adapter()
    assert same(codes(tuned), unmerged)
    text = torch.randint(3, 128, (256,), generator=torch.Generator().manual_seed(1))
    given = {"calibration": pql.Calibration(data=text, n_tokens=256, sequence_length=64)}
    for strategy, more in (("requantize", {}), ("calibrated", given), ("append", given), ("keep", {})):
        merged, report = pql.merge_back(copy.deepcopy(tuned), strategy=strategy, progress=False, **more)
        assert {layer.strategy for layer in report.layers} == {strategy}
        assert all(stack.spec.row_parts in (1, 2) for stack in pql.quantized_stacks(merged).values())


def test_a_tensor_of_another_shape_in_an_expert_is_named(tmp_path):
    write_aqlm(tmp_path / "published", "mixtral", AQLM["2x8"])
    file = tmp_path / "published" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.block_sparse_moe.experts.2.w3.codebooks"
    save_file(tensors | {name: tensors[name][:1].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.experts\.gate_up_proj\.codebooks: .*of shape \(1, 256, 1, 8\)"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "published")
