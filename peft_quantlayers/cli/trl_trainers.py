"""TRL's trainers, which ``train`` runs, and their loss."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn


def trainer_of(name: str) -> tuple[type, type]:
    """The class of the arguments and the trainer of TRL: "sft" or "dpo".

    Raises:
        ImportError: TRL is not installed.
    """
    try:
        import trl
    except ImportError:
        raise ImportError("train needs TRL: pip install 'peft_quantlayers[train]'.") from None
    if name == "dpo":
        return trl.DPOConfig, trl.DPOTrainer
    return trl.SFTConfig, trl.SFTTrainer


def trainer_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The loss of a PEFT model as TRL's trainers compute it, in tiles of the logits where the release does that."""
    try:
        from trl.trainer import add_fused_lm_head
    except ImportError:  # an older release, or none
        return model(input_ids=ids, labels=ids).loss
    base: Any = model
    add_fused_lm_head(base.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    with patch.object(torch, "is_autocast_enabled", lambda *_: False):  # it knows no meta device
        return -model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.mean()
