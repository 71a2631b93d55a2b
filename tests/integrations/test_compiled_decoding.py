"""A decoding step with a static cache compiles to one graph that a CUDA graph can hold, and serves every token."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import StaticCache

import peft_quantlayers as pql
from peft_quantlayers import AQLMConfig, HQQConfig

from .tiny import tiny_model

PROMPT, NEW = 5, 4
# By hand: the methods whose product is an operator of their own, which the graph has to hold.
CONFIGS = {
    "hqq": HQQConfig(nbits=4, group_size=32),
    "aqlm": AQLMConfig(num_codebooks=2, nbits_per_codebook=4, rounds=1),
}
# What makes the host wait for the device, or depends on values there: no graph holds it.
WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero")


def decoded(model, step, prompt: torch.Tensor) -> list[torch.Tensor]:
    """Logits of each new token, greedily, with a cache of a fixed size; ``step`` runs the model for one token."""
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW)
    logits = model(input_ids=prompt, past_key_values=cache).logits[:, -1:]
    found = [logits]
    for place in range(PROMPT, PROMPT + NEW - 1):
        token, at = logits.argmax(-1), torch.tensor([[place]])
        logits = step(input_ids=token, position_ids=at, past_key_values=cache).logits
        found.append(logits)
    return found


@pytest.mark.parametrize(("method", "with_adapter"), zip(CONFIGS, (True, False), strict=True))
@torch.no_grad()
def test_every_token_is_one_replay_of_one_graph(method, with_adapter):
    model = pql.quantize_model(tiny_model(), CONFIGS[method], progress=False).eval()
    if with_adapter:
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, lora).eval()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    prompt = torch.randint(3, 100, (1, PROMPT))
    expected = decoded(model, model, prompt)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    for logits, truth in zip(decoded(model, compiled, prompt), expected, strict=True):
        torch.testing.assert_close(logits, truth, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
    names = [str(node.target) for node in graphs[0].graph.nodes]
    operator = f"quantlayers.{method}_linear"
    assert sum(operator in name for name in names) == len(pql.quantized_modules(model))
    assert not [name for name in names if name in WAITING]
