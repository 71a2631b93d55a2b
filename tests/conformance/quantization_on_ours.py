"""PEFT's tests of quantized models (``test_quantization.py``) on a Llama quantized by us.

Copied beside them by ``run.py``, since they load their models through relative imports.
"""

import os
import tempfile
from dataclasses import dataclass

import torch
from every_method import quick_config
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conformance.linears import SPECS
from peft_quantlayers import AQLMConfig, HQQConfig, QuantConfig
from peft_quantlayers.lora.quantization_backend import QuantizedLinearBackend

from . import test_quantization as upstream

N_LAYERS = 2
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
}


def _saved_float_model() -> str:
    torch.manual_seed(0)
    folder = tempfile.mkdtemp(prefix="tiny-llama-")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


@dataclass
class Loader:
    """What PEFT's tests ask of a quantization."""

    name: str
    config: QuantConfig
    backend_cls = QuantizedLinearBackend
    supports_merge = True
    supports_non_quantized_comparison = True
    expected_layer_count = 2 * N_LAYERS
    model_id: str = ""

    def load_model(self) -> LlamaForCausalLM:
        self.model_id = self.model_id or _saved_float_model()
        return AutoModelForCausalLM.from_pretrained(self.model_id, quantization_config=self.config)


LOADERS = {name: [Loader(name, quick_config(name))] for name in SPECS} | {
    "hqq": [Loader("hqq_8bit", HQQConfig(nbits=8, group_size=32)), Loader("hqq_4bit", HQQConfig(group_size=32))],
    "aqlm": [Loader("aqlm_2x8", AQLMConfig(num_codebooks=2, in_group_size=8))],
}

# PEFT's parametrization holds this very list.
upstream.QUANTIZATION_BACKENDS[:] = LOADERS.get(os.environ.get("CONFORMANCE_METHOD", "hqq"), [])
TestQuantization = upstream.TestQuantization
