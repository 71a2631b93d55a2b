"""The tiny models and adapters behind the golden files, built with the public API only.

Every number in them is a small integer over a power of two. Products and sums of such numbers are exact in float32 in
any order, so the model and the adapters' deltas have the same bits on every machine, whatever its instruction set.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import peft_quantlayers as pql
from peft_quantlayers import AQLMConfig, HQQConfig, QuantScalesConfig

FILES = Path(__file__).parent / "files"
VOCABULARY = 64
# (2, 8) token ids of which the logits are compared.
IDS = (torch.arange(16) * 29 + 5).view(2, 8) % VOCABULARY
# (8, 32) token ids to calibrate on.
CALIBRATION_IDS = ((torch.arange(256) * 37 + torch.arange(256) ** 2 // 3) % VOCABULARY).view(8, 32)

AQLM = AQLMConfig(num_codebooks=2, nbits_per_codebook=4, in_group_size=8, rounds=2)
# One layer of each width, both axes, integer zeros, and every dtype of scales.
MIXED = HQQConfig(
    nbits=4,
    group_size=32,
    skip_modules=["o_proj"],
    overrides={
        "q_proj": {"nbits": 8, "group_size": None},
        "k_proj": {"nbits": 3, "group_size": 16, "scale_dtype": "bfloat16"},
        "v_proj": {"nbits": 2, "group_size": 8, "axis": 0},
        "gate_proj": {"nbits": 5, "scale_dtype": "float32"},
        "up_proj": {"nbits": 6, "integer_zero": True},
        "down_proj": {"nbits": 1, "group_size": 8},
    },
)

# Of the models that are built like a Llama.
SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def integers(shape: torch.Size | tuple[int, ...], *, seed: int, largest: int) -> Tensor:
    """Bell-shaped integers between ``-largest`` and ``largest``, a multiple of 4, as float32."""
    generator = torch.Generator().manual_seed(seed)
    bound = largest // 4
    return torch.randint(-bound, bound + 1, (4, *shape), generator=generator).sum(0).float()


def with_exact_weights(model: nn.Module) -> nn.Module:
    """``model`` with each parameter replaced by integers over 512; weights of norms lie around 1."""
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            is_norm_weight = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(integers(parameter.shape, seed=seed, largest=256) / 512 + is_norm_weight)
    return model.eval()


def llama(n_blocks: int = 1) -> PreTrainedModel:
    """A Llama 32 channels wide, with biases and tied embeddings."""
    config = LlamaConfig(
        **SIZES, intermediate_size=64, num_hidden_layers=n_blocks, tie_word_embeddings=True, attention_bias=True
    )
    return with_exact_weights(LlamaForCausalLM(config))


def gpt2() -> PreTrainedModel:
    """A GPT-2 of one block: its linear layers are transformers' ``Conv1D``."""
    config = GPT2Config(
        n_embd=32,
        n_layer=1,
        n_head=4,
        n_positions=64,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    return with_exact_weights(GPT2LMHeadModel(config))


def load(name: str) -> PreTrainedModel:
    """The golden model ``name``."""
    folder = FILES / name
    if (folder / "qmodel.pt").exists():
        return pql.load_hqq_folder(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def load_adapter(base: str, adapter: str) -> PeftModel:
    """The golden model ``base`` with the golden adapter ``adapter`` on it."""
    return PeftModel.from_pretrained(load(base), FILES / adapter).eval()


def logits_of(model: nn.Module) -> Tensor:
    """Of ``IDS``, (2, 8, vocabulary), float32."""
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def with_lora(model: nn.Module, **fields: object) -> PeftModel:
    """An adapter of rank 2 on all linear layers; its delta is a quarter of a step of 4 bits or so."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", **fields)
    peft_model = get_peft_model(model, config)
    step = 1 / (128 if config.use_qalora else 512)  # the mean of a group's inputs is small
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(peft_model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(
                    integers(parameter.shape, seed=seed, largest=16) * (1 / 16 if "lora_A" in name else step)
                )
    return peft_model.eval()


def with_scales(model: nn.Module) -> PeftModel:
    """Tuned scales, zeros, biases and norms, each a little off the values of ``model``."""
    config = QuantScalesConfig(train=("scales", "zeros", "biases", "norms"))
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(peft_model.named_parameters()):
            if "quant_scales_tensors" in name:
                parameter.mul_(1 + integers(parameter.shape, seed=seed, largest=16) / 256)
    return peft_model.eval()


def quantized(model: nn.Module, config: pql.QuantConfig) -> nn.Module:
    """``model`` quantized in place, without calibration."""
    return pql.quantize_model(model, config, progress=False)


def with_both_methods() -> nn.Module:
    """AQLM in the attention, HQQ in the MLP."""
    model = quantized(llama(), AQLMConfig(num_codebooks=1, nbits_per_codebook=6, rounds=1, skip_modules=["mlp"]))
    return quantized(model, HQQConfig(nbits=3, group_size=16, skip_modules=["self_attn"]))


def in_float32_on_bfloat16(folder: Path) -> nn.Module:
    """A bfloat16 model whose quantized layers compute in float32: the config then says ``compute_dtype``."""
    llama().save_pretrained(folder)
    config = HQQConfig(nbits=4, group_size=16, compute_dtype="float32")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)


def with_branches() -> nn.Module:
    """LoRA kept as low-rank branches of layers with 2-bit codes."""
    peft_model = with_lora(quantized(llama(), HQQConfig(nbits=2, group_size=16)), rank_pattern={"up_proj": 3})
    return pql.merge_back(peft_model, strategy="keep")[0]


def calibrated(folder: Path, on_layer: Callable[[pql.LayerResult], None] | None = None) -> nn.Module:
    """A Llama quantized on calibration data, with its finished blocks kept in ``folder`` or taken from there."""
    known = {field.name for field in dataclasses.fields(pql.Calibration)}
    later = {name: value for name, value in {"asymmetric_targets": False}.items() if name in known}
    calibration = pql.Calibration(
        data=CALIBRATION_IDS, n_tokens=256, sequence_length=32, shrinkage=0.3, resume_folder=folder, **later
    )
    config = HQQConfig(nbits=3, group_size=16)
    return pql.quantize_model(load("float"), config, calibration=calibration, progress=False, on_layer=on_layer)
