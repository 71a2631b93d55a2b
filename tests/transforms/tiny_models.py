"""Tiny float64 models of many families whose norms have gains and biases of their own, and their outputs."""

import torch
import transformers as hf
from torch import Tensor, nn

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
NEXT = {"layer_types": ["full_attention", "full_attention"]}

MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, attention_bias=True)),
    "llama tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, head_dim=16)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=16)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**GROUPED, head_dim=16, query_pre_attn_scalar=16, sliding_window=8)
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=96,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        )
    ),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**GROUPED)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**GROUPED, residual_multiplier=0.5)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**GROUPED, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            **GROUPED,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
        )
    ),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**GROUPED)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, head_dim=16, query_pre_attn_scalar=16)),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
}


def tiny_model(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model with random weights, the same at every call; norms have gains and biases that are no identity."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others have no float64
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) * 0.5)
            elif "embed" not in parameter_name and "wte" not in parameter_name:
                parameter.mul_(4)  # so that nonlinearities are no straight lines
    return model.to(dtype)


def token_ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, seed: int = 1) -> Tensor:
    return model(input_ids=token_ids(seed), use_cache=False).logits.double()


def change(after: Tensor, before: Tensor) -> float:
    """Relative."""
    return float((after - before).norm() / before.norm())
