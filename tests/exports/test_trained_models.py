"""What was trained is what is served: the loss of training, in the engine's own reader."""

import importlib.util

import export_readers
import pytest
import torch
from llama_cpp_converter import ensure_converter
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

import peft_quantlayers as pql

from .converters import in_a_child  # noqa: F401
from .models import readable
from .tokenizers_for_tests import llama_tokenizer

IDS = torch.randint(3, 300, (24,), generator=torch.Generator().manual_seed(3))
needs_mlx = pytest.mark.skipif(
    not importlib.util.find_spec("mlx_lm"), reason="needs mlx-lm: pip install 'mlx-lm[cpu]'"
)
needs_llama_cpp = pytest.mark.skipif(
    not importlib.util.find_spec("xllamacpp"), reason="needs llama.cpp: pip install xllamacpp"
)


def trained(*, is_merge_aware, **fields):
    """A PEFT model that has learned ``IDS`` a little."""
    model = get_peft_model(readable("llama"), LoraConfig(r=4, target_modules="all-linear", **fields))
    if is_merge_aware:
        pql.enable_merge_aware(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(15):
        loss = model(IDS[None], labels=IDS[None]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def loss_of(logits):
    return cross_entropy(torch.as_tensor(logits)[:-1].float(), IDS[1:]).item()


@torch.no_grad()
def loss_in_training(model):
    return loss_of(model(IDS[None]).logits[0])


def merged_models():
    aware = trained(is_merge_aware=True)
    yield loss_in_training(aware), pql.merge_back(aware, strategy="aware").model
    qalora = trained(is_merge_aware=False, use_qalora=True, qalora_group_size=32)
    yield loss_in_training(qalora), pql.merge_back(qalora, strategy="exact").model


@needs_mlx
def test_merge_aware_and_qalora_end_exact_in_mlx(tmp_path):
    untrained = loss_in_training(readable("llama"))
    for index, (expected, model) in enumerate(merged_models()):
        folder = tmp_path / str(index)
        pql.export(model, folder, "mlx")
        assert loss_of(export_readers.mlx(str(folder), IDS.numpy(), None)) == pytest.approx(expected, abs=1e-4)
        assert expected < untrained - 0.3


@needs_llama_cpp
def test_merge_aware_and_qalora_end_exact_in_llama_cpp(tmp_path):
    ensure_converter()
    for index, (expected, model) in enumerate(merged_models()):
        folder = tmp_path / str(index)
        report = pql.export(model, folder, "gguf", tokenizer=llama_tokenizer())
        assert report.is_exact
        # llama.cpp rounds activations to 8 bits, whatever the weights are.
        assert loss_of(export_readers.llama_cpp(str(folder), IDS.numpy(), None)) == pytest.approx(expected, rel=5e-3)
