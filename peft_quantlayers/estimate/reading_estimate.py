"""What loading a model and running it on texts takes, without gradients."""

from __future__ import annotations

import torch
from torch import nn

from .calibration_time import seconds_of_product
from .estimates import Estimate
from .live_bytes import bytes_of_imports
from .processor_time import processor_seconds

# Of a window's logits: as the model gives them, and in float32 for the loss.
_LOGIT_COPIES = 2
# A sample of weights that is read for each new token, larger than a processor's cache.
_READ_ROWS, _READ_INPUTS = 4096, 4096


def estimate_reading(
    step: str,
    *,
    weights: dict[str, int],
    n_parameters: int = 0,
    n_tokens: int = 0,
    n_new: int = 0,
    logits: int = 0,
    disk: int = 0,
    notes: tuple[str, ...] = (),
) -> Estimate:
    """Memory and time of running models on the CPU.

    Args:
        step: what is done, in a word.
        weights: bytes in memory, by what they are.
        n_parameters: numbers of all models that run.
        n_tokens: that are read many at a time, by each model.
        n_new: that are generated, one at a time, by each model.
        logits: numbers of them at once.
        disk: bytes that are written.
        notes: what was left out.

    Returns:
        Estimate whose seconds are those of the products alone, timed on a sample: a little less than it will take.
    """
    memory = {"libraries": bytes_of_imports(), **weights, "logits": 4 * _LOGIT_COPIES * logits}
    seconds = seconds_of_product(n_tokens) * n_parameters if n_tokens else 0.0
    if n_new:
        weight, x = torch.ones(_READ_ROWS, _READ_INPUTS), torch.ones(1, _READ_INPUTS)
        nn.functional.linear(x, weight)
        of_token = processor_seconds(nn.functional.linear, x, weight) / weight.numel()
        seconds += of_token * n_parameters * n_new
    return Estimate(step=step, memory=memory, disk=disk, seconds=seconds if n_tokens or n_new else None, notes=notes)
