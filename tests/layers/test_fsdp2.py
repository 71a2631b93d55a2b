"""FSDP2 shards the quantized tensors row by row, and gathers them for the product."""

import torch
from processes import WORLD_SIZE, in_processes, needs_gloo, run_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from peft_quantlayers import HQQLinear, HQQSpec


def make_model(**fields) -> nn.Module:
    torch.manual_seed(0)
    spec = HQQSpec(**{"nbits": 3, "group_size": 8} | fields)
    quantized = [HQQLinear.from_linear(nn.Linear(48, 48), spec, layer_name=str(index)) for index in range(2)]
    for layer in quantized:
        layer.bias.requires_grad_(False)
    return nn.Sequential(quantized[0], nn.Linear(48, 48), quantized[1])


def sharded_run(rank: int) -> None:
    for fields in ({}, {"axis": 0}):
        model = make_model(**fields)
        x = torch.randn(4, 48)
        y = model(x)
        y.sum().backward()
        expected = (y.detach(), model[1].weight.grad)
        model.zero_grad()
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        for _ in range(2):
            model.zero_grad()
            y = model(x)
            y.sum().backward()
        local_codes = model[0].W_q.to_local()
        assert local_codes.shape[0] == 48 // WORLD_SIZE, local_codes.shape
        assert local_codes.dtype == torch.uint8
        assert torch.equal(y, expected[0])
        torch.testing.assert_close(model[1].weight.grad.full_tensor(), expected[1])
        state = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
        for name, tensor in make_model(**fields).state_dict().items():
            assert torch.equal(state[name], tensor), name


@needs_gloo
def test_a_sharded_model_gives_the_same_outputs_gradients_and_state():
    run_file(__file__)


if __name__ == "__main__":
    in_processes(sharded_run)
