"""Routing agreement of mixtures: the same model, one whose router differs, adapters, and what is no mixture."""

import pytest
import torch
from mixtures import MIXTURES, tiny_mixture
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.evaluate import routing_agreement

IDS = torch.randint(3, 128, (256,), generator=torch.Generator().manual_seed(5))


def agreement(model, reference):
    return routing_agreement(model, reference, IDS, window=64, progress=False)


@pytest.mark.parametrize("family", sorted(MIXTURES))
def test_a_model_agrees_with_itself_and_few_bits_change_some_choices(family):
    reference = tiny_mixture(family)
    same = agreement(reference, reference)
    assert same.total == 1
    assert same.n_tokens == 256
    assert same.per_layer
    changed = pql.quantize_model(tiny_mixture(family), pql.HQQConfig(nbits=2, group_size=16), progress=False)
    assert 0.2 < agreement(changed, reference).total < 1


def test_each_layer_counts_tokens_whose_set_of_experts_is_the_same():
    reference, model = tiny_mixture("qwen3_moe"), tiny_mixture("qwen3_moe")
    router = model.model.layers[1].mlp.gate
    chosen = []

    def swap(module, args, output):
        """The order of the experts of each token, and in the first 16 tokens of a window one expert."""
        index = output[2].flip(-1).clone()
        chosen.append(output[2])
        index[:16, 0] = (index[:16, 0] + 1) % 4
        return (*output[:2], index)

    router.register_forward_hook(swap)
    found = agreement(model, reference)
    # An expert that is moved onto the token's other one is a change too.
    assert found.per_layer == {"model.layers.0.mlp.experts": 1, "model.layers.1.mlp.experts": 0.75}
    assert found.total == 0.875
    assert len(chosen) == 4
    assert not model.model.layers[0].mlp.experts._forward_pre_hooks


def test_adapters_on_experts_and_attention_are_part_of_the_model():
    reference = tiny_mixture("qwen3_moe")
    torch.manual_seed(1)
    lora = LoraConfig(
        target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False, lora_alpha=64,
    )  # fmt: skip
    model = get_peft_model(tiny_mixture("qwen3_moe"), lora).train()
    assert agreement(model, reference).total < 1
    assert model.training
    with model.disable_adapter():
        assert agreement(model, reference).total == 1


def test_models_without_experts_or_with_others_are_refused():
    sizes = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
    with pytest.raises(ValueError, match="is for mixtures of experts"):
        agreement(dense, dense)
    with pytest.raises(ValueError, match=r"2 layers with experts and the reference 1"):
        agreement(tiny_mixture("qwen3_moe"), tiny_mixture("deepseek_v3"))
    with pytest.raises(ValueError, match="one window"):
        routing_agreement(dense, dense, IDS[:8], window=64)
