"""Models that accelerate has offloaded: they compute, PEFT's merge works, and all else names the way out."""

import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_module
from every_method import METHODS, quick_config
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn

import peft_quantlayers as pql
from peft_quantlayers.evaluate import perplexity

from .tiny import tiny_model, token_ids

pytestmark = pytest.mark.usefixtures("toy_method")
CONFIGS = {name: quick_config(name) for name in METHODS} | {
    "aqlm": pql.AQLMConfig(num_codebooks=1, nbits_per_codebook=9, rounds=0)  # codes of two bytes
}


def quantized(method: str = "hqq") -> nn.Module:
    return pql.quantize_model(tiny_model(), CONFIGS[method], progress=False)


def with_adapter(model: nn.Module, kind=LoraConfig) -> nn.Module:
    torch.manual_seed(1)
    fields = {"init_lora_weights": False} if kind is LoraConfig else {"init_weights": False}
    return get_peft_model(model, kind(target_modules=["q_proj", "down_proj"], r=4, **fields)).eval()


def offload(model: nn.Module, where: str, folder) -> nn.Module:
    device = torch.device("cpu")
    if where == "disk":
        return disk_offload(model, str(folder), execution_device=device)
    return cpu_offload(model, execution_device=device)


def assert_same(model: nn.Module, expected: torch.Tensor) -> None:
    """Up to rounding: hooks take PEFT's own forward, which adds in another order."""
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("method", CONFIGS)
def test_an_offloaded_model_computes_the_same(method, where, tmp_path):
    expected = logits(with_adapter(quantized(method)))
    model = offload(with_adapter(quantized(method)), where, tmp_path)
    assert next(layer for layer in model.modules() if isinstance(layer, pql.QuantizedLinear)).codes.is_meta
    assert_same(model, expected)


@pytest.mark.parametrize("kind", [LoraConfig, LoHaConfig])
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("method", CONFIGS)
def test_merge_and_unload_gives_what_it_gives_in_memory(method, where, kind, tmp_path):
    expected = logits(with_adapter(quantized(method), kind).merge_and_unload())
    model = offload(with_adapter(quantized(method), kind), where, tmp_path)
    merged = model.merge_and_unload()
    assert_same(merged, expected)
    assert_same(merged, expected)  # the weights were offloaded again, not lost


def test_merge_adapter_and_unmerge_restore_the_outputs():
    model = with_adapter(quantized())
    expected = logits(model)
    model.merge_adapter()
    expected_merged = logits(model)
    model.unmerge_adapter()
    model = cpu_offload(model, execution_device=torch.device("cpu"))
    model.merge_adapter()
    assert_same(model, expected_merged)
    model.unmerge_adapter()
    assert_same(model, expected)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize(
    "refused",
    [
        lambda: (pql.merge_back, with_adapter(quantized())),
        lambda: (pql.dequantize_model, quantized()),
        lambda: (lambda model: pql.quantize_model(model, CONFIGS["hqq"], progress=False), tiny_model()),
    ],
    ids=["merge_back", "dequantize_model", "quantize_model"],
)
def test_what_needs_all_weights_names_the_way_out_and_changes_nothing(refused, where, tmp_path):
    call, model = refused()
    expected = logits(model)
    model = offload(model, where, tmp_path)
    modules = list(model.modules())
    with pytest.raises(ValueError, match=r"offloaded .*remove_hook_from_module.*not changed"):
        call(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert_same(model, expected)
    remove_hook_from_module(model, recurse=True)  # the way out that was named
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call(model)


def test_a_model_on_meta_is_refused():
    with torch.device("meta"):
        model = tiny_model()
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight is on the meta device.*not changed"):
        pql.quantize_model(model, CONFIGS["hqq"], progress=False)


def test_perplexity_of_an_offloaded_model_is_that_of_the_model():
    ids = token_ids().flatten()
    expected = perplexity(quantized(), ids, window=9)
    assert perplexity(cpu_offload(quantized(), execution_device=torch.device("cpu")), ids, window=9) == pytest.approx(
        expected
    )
