"""Block finetuning: which tensors of a layer are trained."""

from types import SimpleNamespace

import torch
from torch import nn

from peft_quantlayers.calibration.finetune import _trainable


def test_integer_metadata_stays_as_codes_do():
    layer = nn.Module()
    for name, dtype in {"codes": torch.uint8, "zeros": torch.int32, "scales": torch.float16}.items():
        layer.register_parameter(name, nn.Parameter(torch.ones(2, 2, dtype=dtype), requires_grad=False))
    layer.spec = SimpleNamespace(codes_name="codes")
    layer.quantized_weight = SimpleNamespace(tensors=dict(layer.named_parameters()))
    [trained] = _trainable(nn.Module(), [layer], norms=False)
    assert trained is layer.scales
    assert (layer.scales.dtype, layer.zeros.dtype, layer.codes.dtype) == (torch.float32, torch.int32, torch.uint8)
