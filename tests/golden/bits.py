"""What quantizers and merges make of small fixed weights, as named tensors.

The tensors are made with the public API only, so that older and newer versions can both make them.
"""

import os
import platform
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import peft_quantlayers as pql
from peft_quantlayers import AQLMConfig, Calibration, HQQConfig, QuantConfig
from quantlayers_kernels import native

from .models import CALIBRATION_IDS, integers, load_adapter

Tensors = dict[str, Tensor]

HQQ = {
    "hqq 8 bits": HQQConfig(nbits=8, group_size=32),
    "hqq 6 bits": HQQConfig(nbits=6, group_size=32),
    "hqq 5 bits": HQQConfig(nbits=5, group_size=32),
    "hqq 4 bits": HQQConfig(nbits=4, group_size=32),
    "hqq 3 bits": HQQConfig(nbits=3, group_size=32),
    "hqq 2 bits": HQQConfig(nbits=2, group_size=16),
    "hqq 1 bit": HQQConfig(nbits=1, group_size=16),
    "hqq one group a row": HQQConfig(nbits=4, group_size=None),
    "hqq axis 0": HQQConfig(nbits=4, group_size=16, axis=0),
    "hqq one group a column": HQQConfig(nbits=3, group_size=None, axis=0),
    "hqq integer zeros": HQQConfig(nbits=4, group_size=32, integer_zero=True),
    "hqq float start": HQQConfig(nbits=4, group_size=32, round_zero=False),
    "hqq without refinement": HQQConfig(nbits=4, group_size=32, refine_scale=False),
    "hqq plain": HQQConfig(nbits=3, group_size=32, round_zero=False, refine_scale=False),
    "hqq no iteration": HQQConfig(nbits=4, group_size=32, iters=0, refine_scale=False),
    "hqq other constants": HQQConfig(nbits=4, group_size=32, iters=8, lp_norm=1.0, beta=5.0, kappa=1.05),
    "hqq bfloat16 scales": HQQConfig(nbits=4, group_size=32, scale_dtype="bfloat16"),
}
AQLM = {
    "aqlm 2x8": AQLMConfig(rounds=2),
    "aqlm 1x8": AQLMConfig(num_codebooks=1, rounds=2),
    "aqlm 3x4": AQLMConfig(num_codebooks=3, nbits_per_codebook=4, in_group_size=4, rounds=2),
    "aqlm two rows a group": AQLMConfig(nbits_per_codebook=5, in_group_size=4, out_group_size=2, rounds=2),
    "aqlm narrow beam": AQLMConfig(nbits_per_codebook=5, rounds=2, beam=4),
}
WITH_CALIBRATION = {
    f"{name}, calibrated": (HQQ | AQLM)[name]
    for name in ("hqq 4 bits", "hqq 2 bits", "hqq integer zeros", "aqlm 2x8", "aqlm 1x8")
}
# By hand: base model, adapter and strategy of what the file holds.
MERGES = {
    "hqq auto": ("hqq", "lora", "auto"),
    "hqq requantize": ("hqq", "lora", "requantize"),
    "hqq requantize, coarse": ("hqq_mixed", "lora", "requantize"),
    "hqq aware": ("hqq", "merge_aware", "aware"),
    "hqq exact": ("hqq", "qalora", "exact"),
    "hqq calibrated": ("hqq", "lora", "calibrated"),
    "hqq keep": ("hqq", "lora", "keep"),
    "hqq dense": ("hqq", "lora", "dense"),
    "hqq tuned scales": ("hqq", "quant_scales", "auto"),
    "aqlm requantize": ("aqlm", "lora", "requantize"),
    "aqlm append": ("aqlm", "lora", "append"),
    "aqlm append, calibrated": ("aqlm", "lora", "append calibrated"),
    "aqlm calibrated": ("aqlm", "lora", "calibrated"),
}


def weight(config: QuantConfig) -> Tensor:
    """(32, 96), for AQLM (64, 96), integers over 2048, with one large column as models have them."""
    made = integers((64 if isinstance(config, AQLMConfig) else 32, 96), seed=103_100, largest=256) / 2048
    made[:, 7] *= 8
    return made


def inputs() -> Tensor:
    """(512, 96), integers over 64: neighbours are correlated, and channels differ in size."""
    made = integers((512, 96), seed=103_101, largest=64)
    made[:, 1:] += integers((512, 96), seed=103_102, largest=64)[:, :-1] + made[:, :-1]
    made[:, ::5] *= 4
    return made / 64


def quantized(config: QuantConfig, *, is_calibrated: bool = False) -> Tensors:
    """The tensors of ``weight(config)`` quantized."""
    given = weight(config)
    linear = nn.Linear(96, len(given), bias=False)
    linear.weight.data = given
    model = nn.Sequential(OrderedDict(layer=linear))
    calibration = Calibration(data=[inputs()], shrinkage=0.3) if is_calibrated else None
    pql.quantize_model(model, config, calibration=calibration, progress=False)
    return state_of(model)


def merged(base: str, adapter: str, strategy: str) -> Tensors:
    """The tensors of the linear layers in the last block of the merged model."""
    strategy, _, given = strategy.partition(" ")
    calibration = None
    if given or strategy == "calibrated":
        calibration = Calibration(data=CALIBRATION_IDS, n_tokens=256, sequence_length=32, shrinkage=0.3)
    peft_model = load_adapter(base, adapter)
    model, _ = pql.merge_back(peft_model, strategy=strategy, calibration=calibration, progress=False)
    return {name: tensor for name, tensor in state_of(model.model.layers[-1]).items() if "norm" not in name}


def state_of(model: nn.Module) -> Tensors:
    """The tensors of ``model``, copied."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}


def dequantized(tensors: Tensors, config: AQLMConfig) -> Tensor:
    """The weight that an item of AQLM stands for, by the definition: a row's scale times a sum of entries."""
    codes, codebooks, scales = (tensors[f"layer.{name}"] for name in ("codes", "codebooks", "scales"))
    entries = codebooks.float()[torch.arange(config.num_codebooks), codes.long() % 2**config.nbits_per_codebook]
    groups = entries.sum(2) * scales.float()  # (n_out, n_in, out_group, in_group)
    return groups.transpose(1, 2).flatten(2).flatten(0, 1)


def machine() -> dict[str, str]:
    """What decides the order of sums: the CPU, torch, and the compiled kernels."""
    cpus = Path("/proc/cpuinfo")
    models = re.findall(r"^(?:model name|model|stepping)\s*: (.*)$", cpus.read_text(), re.M) if cpus.exists() else []
    kernels = native.VARIANTS[native.variant()] if native.is_available() else "plain torch"
    return {
        "cpu": " ".join(models[:3]) or platform.processor(),
        "torch": torch.__version__,
        "instructions of torch": torch.backends.cpu.get_cpu_capability(),
        "mode of MKL": os.environ.get("MKL_CBWR", ""),
        "compiled kernels": kernels,
    }


def recipes() -> dict[str, Callable[[], Tensors]]:
    """How to make each item again."""
    plain = {name: lambda config=config: quantized(config) for name, config in (HQQ | AQLM).items()}
    calibrated = {
        name: lambda config=config: quantized(config, is_calibrated=True) for name, config in WITH_CALIBRATION.items()
    }
    merges = {f"merge: {name}": lambda given=given: merged(*given) for name, given in MERGES.items()}
    return plain | calibrated | merges
