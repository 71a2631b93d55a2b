"""Two processes: a saved folder loads with FSDP2 and trains as in one; what does not work is refused with the road."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from processes import WORLD_SIZE, in_processes, needs_gloo, run_file
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig
from transformers.distributed.configuration_utils import DistributedConfig

import peft_quantlayers as pql
from peft_quantlayers.lora.base_fingerprint import base_fingerprints

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MODELS = {"llama": LlamaConfig(**SIZES), "mixtral": MixtralConfig(**SIZES, num_local_experts=4)}
# By hand: codes of one byte and of two.
CONFIGS = {
    "hqq": pql.HQQConfig(nbits=3, group_size=16),
    "aqlm": pql.AQLMConfig(num_codebooks=1, nbits_per_codebook=9, rounds=0),
}
IDS = torch.arange(3, 17).view(2, 7)
STEPS = 3


def losses(model: nn.Module) -> list[float]:
    """Of a few steps of AdamW on the same data in every process."""
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(STEPS):
        loss = model(input_ids=IDS, labels=IDS).loss
        found.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


def load(folder: Path, **kwargs) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits = model(IDS).logits
    return logits.full_tensor() if isinstance(logits, DTensor) else logits


def check_sharded(rank: int, folder: Path) -> None:
    reference = load(folder)
    model = load(folder, distributed_config=DistributedConfig(fsdp_size=WORLD_SIZE))
    layers = pql.quantized_modules(model)
    assert layers.keys() == pql.quantized_modules(reference).keys()
    assert all(isinstance(layer.codes, DTensor) for layer in layers.values())
    assert torch.equal(logits_of(model), logits_of(reference))
    expected = losses(reference)
    assert expected[-1] < expected[0]
    assert losses(model) == pytest.approx(expected, rel=1e-6)
    for method in (pql.dequantize_model, lambda model: pql.quantize_model(model, CONFIGS["hqq"])):
        with pytest.raises(ValueError, match=r"adapters|sharded over processes.*in one process"):
            method(model)


def check_saved(rank: int, folder: Path) -> None:
    """Gathered by all, written by one: the same tensors, codes of more than a byte as in any file, with checksums."""
    model = load(folder, distributed_config=DistributedConfig(fsdp_size=WORLD_SIZE))
    expected = logits_of(model)
    with pytest.raises(ValueError, match=r"sharded over processes.*save_pretrained\(folder, is_main_process"):
        pql.save_model(model, folder / "never")
    for original in (True, False):
        again = folder / f"again-{original}"
        model.save_pretrained(again, is_main_process=rank == 0, save_original_format=original)
        if rank == 0:
            assert pql.verify_model(again) == []
            assert torch.equal(logits_of(load(again)), expected)
            if original:
                old, new = (load_file(each / "model.safetensors") for each in (folder, again))
                assert old.keys() == new.keys()
                assert all(torch.equal(old[name], new[name]) and old[name].dtype == new[name].dtype for name in old)
        dist.barrier()


def check_merging(rank: int, folder: Path) -> None:
    model = load(folder, distributed_config=DistributedConfig(fsdp_size=WORLD_SIZE))
    torch.manual_seed(1)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    for merge in (pql.merge_back, lambda model: model.merge_adapter(), lambda model: model.merge_and_unload()):
        with pytest.raises(ValueError, match=r"sharded over processes.*in one process.*not changed"):
            merge(peft_model)
    expected = logits_of(peft_model)
    with pytest.raises(ValueError, match=r"sharded over processes.*merge-aware.*in one process"):
        pql.enable_merge_aware(peft_model)
    base = next(iter(pql.quantized_modules(model).values()))
    with pytest.raises(ValueError, match=r"sharded over processes.*writing a weight.*in one process"):
        base.weight = torch.zeros(base.out_features, base.in_features)
    # The way out: save the adapter (all processes gather it, one writes), and merge it on the whole model.
    peft_model.save_pretrained(folder / "adapter", is_main_process=rank == 0)
    if rank == 0:
        whole = PeftModel.from_pretrained(load(folder), folder / "adapter")
        base = whole.peft_config["default"].quantized_base["layers"]
        assert base == base_fingerprints(load(folder))
        torch.testing.assert_close(logits_of(whole), expected)
        assert pql.merge_back(whole)[1].layers
    dist.barrier()


def check_base_recorded(rank: int, folder: Path) -> None:
    """Which base an adapter has is known of a sharded one too: another one is told of, also beside an adapter."""
    model = load(folder, distributed_config=DistributedConfig(fsdp_size=WORLD_SIZE))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = PeftModel.from_pretrained(model, folder / "adapter")
        again.load_adapter(folder / "adapter", "second")
    for codes in (layer.codes.to_local() for layer in pql.quantized_modules(model).values()):
        codes.bitwise_xor_(1)
    with pytest.warns(UserWarning, match="trained on the quantized base.*this is another one"):
        again.load_adapter(folder / "adapter", "third")


def check_refused(rank: int, folder: Path, float_folder: Path) -> None:
    for size in ("tp_size", "pp_size", "fsdp_size"):
        with pytest.raises(ValueError, match=rf"{size}=2\) while quantizing.*save_model"):
            load(
                float_folder,
                quantization_config=CONFIGS["hqq"],
                distributed_config=DistributedConfig(**{size: WORLD_SIZE}),
            )
    with pytest.raises(ValueError, match=r"tp_size=2\) while quantizing"), pytest.warns(FutureWarning):
        load(float_folder, quantization_config=CONFIGS["hqq"], tp_plan="auto")
    for sizes in ({"tp_size": 2}, {"pp_size": 2}, {"ep_size": 2, "fsdp_size": 2}):
        with pytest.raises(ValueError, match=rf"{next(iter(sizes))}=2\) is not supported.*fsdp_size"):
            load(folder, distributed_config=DistributedConfig(**sizes))


def run(rank: int, folder: str) -> None:
    for saved in sorted(Path(folder).glob("*-quantized-*")):
        check_sharded(rank, saved)
        check_saved(rank, saved)
        check_merging(rank, saved)
        check_base_recorded(rank, saved)
    check_refused(rank, Path(folder, "mixtral-quantized-hqq"), Path(folder, "mixtral-float"))


def save_models(folder: Path) -> None:
    for name, model_config in MODELS.items():
        for method, config in CONFIGS.items():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config)).eval()
            model.save_pretrained(folder / f"{name}-float")
            quantized = pql.quantize_model(model, config, progress=False)
            quantized.save_pretrained(folder / f"{name}-quantized-{method}")


@needs_gloo
def test_a_saved_folder_loads_sharded_and_trains_as_in_one_process(tmp_path):
    save_models(tmp_path)
    run_file(__file__, tmp_path)


if __name__ == "__main__":
    in_processes(run)
