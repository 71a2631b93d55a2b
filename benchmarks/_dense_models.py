"""Dense models with quantized weights in them, and what these weights took: needs torch and transformers only.

A quantizer's environment writes such a folder, ours scores it, so that only weights differ.
"""

import json
import resource
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

WEIGHTS = "model.safetensors"
MEASURED = "measured.json"
# Left dense by everyone: the head, and a layer that sentence embeddings do not read.
LEFT_DENSE = ("lm_head", "pooler.dense")


def load_float(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A language model with its head, any other model without one."""
    architecture = AutoConfig.from_pretrained(folder).architectures[0]
    kind = AutoModelForCausalLM if architecture.endswith("ForCausalLM") else AutoModel
    return kind.from_pretrained(folder, dtype=dtype).eval()


def linear_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """By name, the shapes (out_features, in_features) of the layers that every quantizer quantizes."""
    return {
        name: module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in LEFT_DENSE
    }


def stored_bits_per_weight(stored: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> float:
    """Bits of all saved tensors of the layers ``shapes``, over the number of their weights.

    Biases are not counted, nor are group indices (``g_idx``) that only count up: readers need none of these.

    Raises:
        ValueError: a layer without a tensor.
    """
    n_bytes = 0
    for layer, shape in shapes.items():
        own = {name.removeprefix(f"{layer}."): t for name, t in stored.items() if name.startswith(f"{layer}.")}
        counted = {
            name: tensor
            for name, tensor in own.items()
            if name != "bias" and not (name.endswith("g_idx") and _counts_up(tensor, shape[1]))
        }
        if not counted:
            raise ValueError(f"nothing was saved for {layer!r}.")
        n_bytes += sum(tensor.nbytes for tensor in counted.values())
    return 8 * n_bytes / sum(shape.numel() for shape in shapes.values())


def _counts_up(g_idx: Tensor, in_features: int) -> bool:
    """Whether these are the groups of neighbouring columns, in their order."""
    n_groups = int(g_idx.max()) + 1
    if g_idx.numel() != in_features or in_features % n_groups:
        return False
    return torch.equal(g_idx.long().cpu(), torch.arange(in_features) // (in_features // n_groups))


def write_dense(float_folder: Path, output: Path, replaced: Mapping[str, Tensor], measured: dict[str, Any]) -> None:
    """Copy a model's folder with some of its parameters replaced, all float32, and ``measured`` beside it.

    Raises:
        ValueError: a parameter that the model lacks, or of another shape, or that is not finite.
    """
    weights = load_file(float_folder / WEIGHTS)
    for name, tensor in replaced.items():
        if name not in weights or weights[name].shape != tensor.shape:
            raise ValueError(f"{name!r}, {tuple(tensor.shape)}, is no parameter of the model in {float_folder}.")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name!r} holds NaN or Inf.")
        weights[name] = tensor.detach().float().contiguous().clone()
    output.mkdir(parents=True, exist_ok=True)
    for file in float_folder.iterdir():
        if file.is_file() and file.name != WEIGHTS:
            shutil.copy(file, output)
    save_file(weights, output / WEIGHTS, metadata={"format": "pt"})
    (output / MEASURED).write_text(json.dumps(measured, indent=2) + "\n")


@contextmanager
def measuring(measured: dict[str, Any]) -> Iterator[None]:
    """Add the CPU seconds of a block, of all its threads and finished processes, and the peak memory up to its end."""
    began, children = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    yield
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    of_children = now.ru_utime + now.ru_stime - children.ru_utime - children.ru_stime
    measured["cpu_s"] = time.process_time() - began + of_children
    measured["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
