"""A small mixture of experts that is trained here, and the texts that it is trained, tuned and measured on.

Qwen3-MoE with 7 M parameters, 16 experts in each of four layers and two for each token. The first text is the test
part of WikiText-2, of which the last tenth is held out; the second one is the Python source of this repository's
package, of which every tenth file is. The tokenizer is trained on what is not held out of the first text, so that
a model that was kept goes on fitting. Shared by ``bench_trained_mixture.py`` and a test, which trains a smaller one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

ROOT = Path(__file__).parents[1]
WIKITEXT = ROOT / "benchmarks" / "data" / "wikitext2-test.txt"
VOCABULARY = 1024
TARGETS = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
Sizes = dict[str, int]
SIZES: Sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 4, "num_experts": 16}


@dataclass(frozen=True, kw_only=True)
class Text:
    """Token ids, (n_tokens,): to train on, and held out."""

    train: Tensor
    held_out: Tensor


def texts(vocabulary: int = VOCABULARY) -> tuple[Text, Text]:
    """Prose and Python code, in the tokens of one tokenizer."""
    prose = WIKITEXT.read_text(encoding="utf-8")
    cut = len(prose) // 10 * 9
    files = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "peft_quantlayers").rglob("*.py"))]
    code = [
        "\n".join(file for at, file in enumerate(files) if (at % 10 == 9) == held_out) for held_out in (False, True)
    ]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([prose[:cut]], vocab_size=vocabulary, show_progress=False)
    parts = [torch.tensor(tokenizer.encode(part).ids) for part in (prose[:cut], prose[cut:], *code)]
    return Text(train=parts[0], held_out=parts[1]), Text(train=parts[2], held_out=parts[3])


def new_mixture(*, seed: int, vocabulary: int = VOCABULARY, **sizes: int) -> Qwen3MoeForCausalLM:
    """Random weights; ``sizes`` are fields of the config, ``SIZES`` by default."""
    torch.manual_seed(seed)
    sizes = SIZES | sizes
    config = Qwen3MoeConfig(
        **sizes,
        intermediate_size=sizes["hidden_size"],
        num_attention_heads=sizes["hidden_size"] // 64,
        num_key_value_heads=max(1, sizes["hidden_size"] // 128),
        head_dim=64,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        # Without it, a few experts take all tokens of a model that is trained for so short a time.
        router_aux_loss_coef=0.02,
        output_router_logits=True,
        tie_word_embeddings=True,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen3MoeForCausalLM(config)


def batches(ids: Tensor, *, batch: int, tokens: int, seed: int) -> Iterator[Tensor]:
    """Random windows (batch, tokens), without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - tokens, (batch,), generator=generator)
        yield torch.stack([ids[start : start + tokens] for start in starts])


def train(
    model: Any, ids: Tensor, *, steps: int, lr: float, batch: int = 8, tokens: int = 128, seed: int = 0
) -> nn.Module:
    """Next-token training of what takes a gradient, in place; the learning rate falls along a cosine."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.95))
    data = batches(ids, batch=batch, tokens=tokens, seed=seed)
    model.train()
    for step in range(steps):
        warmup = min(1.0, (step + 1) / max(1, steps // 20))
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))
        windows = next(data)
        model(input_ids=windows, labels=windows, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
