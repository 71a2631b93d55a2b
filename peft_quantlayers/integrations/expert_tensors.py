"""Where the files of a float model keep the experts that lie in one parameter of the model.

transformers joins what checkpoints keep expert by expert, and splits it again when it saves. Engines read the files'
form, so exports ask here which tensor holds which rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from ..layers.expert_types import stack_at


@dataclass(frozen=True, kw_only=True)
class ExpertTensor:
    """One tensor of the files.

    Fields:
        key: its name.
        expert: whose weight it is a part of; None for a tensor with the whole weights of all experts.
        rows: of the expert's weight (out_features, in_features), those that it holds.
        is_transposed: its last two dimensions are (in_features, rows).
    """

    key: str
    expert: int | None
    rows: slice
    is_transposed: bool


def expert_tensors(model: nn.Module, name: str) -> tuple[ExpertTensor, ...]:
    """The tensors of the files that make the fused weight ``name`` of ``model``, dense or quantized, expert by expert.

    () where that is not known: the files mix rows of several experts, or put them in another order.
    """
    module, entry = stack_at(model, name)
    weight: Any = getattr(module, entry.parameter)
    n_experts, first, second = weight.shape
    out_features = second if entry.is_transposed else first
    # Each number says of which row of which expert it is, so that one can read off where the conversions put it.
    probe = torch.arange(n_experts * out_features).view(n_experts, out_features, 1)
    found = []
    for key, tensor in _as_in_files(model, name, probe.transpose(1, 2) if entry.is_transposed else probe).items():
        is_transposed = tensor.shape[-1] != 1
        rows = tensor.squeeze(-2 if is_transposed else -1)
        if torch.equal(rows, probe.squeeze(-1)):
            found.append(ExpertTensor(key=key, expert=None, rows=slice(0, out_features), is_transposed=is_transposed))
            continue
        start, stop = int(rows.min()), int(rows.max()) + 1
        expert, offset = divmod(start, out_features)
        if not torch.equal(rows, torch.arange(start, stop)) or stop > (expert + 1) * out_features:
            return ()
        part = slice(offset, offset + stop - start)
        found.append(ExpertTensor(key=key, expert=expert, rows=part, is_transposed=is_transposed))
    return tuple(sorted(found, key=lambda each: (each.expert or 0, each.rows.start)))


def _as_in_files(model: nn.Module, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a float model of the class of ``model`` writes, in place of the parameter ``name``, of ``tensor``."""
    if not isinstance(model, PreTrainedModel):
        return {name: tensor}
    conversions = [
        entry for entry in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(entry, PrefixChange)
    ]
    plain: Any = SimpleNamespace(_weight_conversions=conversions or None, config=model.config)
    return revert_weight_conversion(plain, {name: tensor}) if conversions else {name: tensor}
