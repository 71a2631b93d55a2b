"""VeLoRA on a quantized layer keeps less for the backward pass than plain LoRA, as on a dense one."""

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import VeloraConfig
from torch import Tensor, nn

import peft_quantlayers as pql


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What is kept for the backward pass, but the layer's own tensors, each counted once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            found[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(x).square().mean()
    loss.backward()
    return sum(found.values())


def test_it_keeps_less_than_plain_lora():
    def adapted(**fields) -> nn.Module:
        model = nn.Sequential(nn.Linear(128, 64))
        pql.quantize_model(model, pql.HQQConfig(nbits=4, group_size=64, skip_modules=[]), progress=False)
        config = LoraConfig(target_modules=["0"], r=8, init_lora_weights=False, **fields)
        return get_peft_model(model, config).train()

    x = torch.randn(8, 4, 128, requires_grad=True)
    plain = saved_bytes(adapted(), x)
    assert plain >= x.nbytes
    assert saved_bytes(adapted(velora_config=VeloraConfig(init_type="random", num_groups=32)), x) < 0.8 * plain
