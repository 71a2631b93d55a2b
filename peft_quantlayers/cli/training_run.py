"""What ``train`` does once all is loaded: show a batch, train or go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerState

from ..estimate.estimates import size_text
from ..report.training_parts import STATE_FILE
from ..storage.free_memory import peak_resident_bytes
from .given_tokenizers import long_windows_refused
from .training_checks import check_adapter_of_checkpoint, check_base_of_checkpoint

IGNORED_LABEL = -100


def trained(trainer: Any, checkpoint: str | None) -> tuple[dict[str, Any], str]:
    """Train, or go on from ``checkpoint``; metrics and log, and the same in words.

    A checkpoint of the last step is loaded, and no more: the Trainer would make another step.
    """
    if checkpoint is not None:
        is_adapter = isinstance(trainer.model, PeftModel)
        if is_adapter:
            check_adapter_of_checkpoint(trainer.model, checkpoint)
            check_base_of_checkpoint(trainer.model.get_base_model(), checkpoint)
        state, wanted = TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE)), trainer.args
        has_all_epochs = state.global_step >= state.max_steps and state.num_train_epochs >= wanted.num_train_epochs
        if state.global_step >= wanted.max_steps if wanted.max_steps > 0 else has_all_epochs:
            if is_adapter:
                trainer.model.load_adapter(checkpoint, trainer.model.active_adapter, is_trainable=True)
            trainer.state = state
            return {"metrics": {}, "log": state.log_history}, f"all {state.global_step} steps had been trained"
    # Without positions for such a length the first long row would end it, after hours perhaps.
    with long_windows_refused(trainer.model, trainer.args.max_length, option="training.max_length"):
        done = trainer.train(resume_from_checkpoint=checkpoint)
    rates = rates_of(trainer, is_resumed=checkpoint is not None)
    found = {"metrics": done.metrics | rates, "log": trainer.state.log_history}
    speed = "" if "tokens_per_second" not in rates else f", {rates['tokens_per_second']:.0f} tokens/s"
    most = "" if "peak_memory_bytes" not in rates else f", at most {size_text(rates['peak_memory_bytes'])} of memory"
    return found, f"trained {done.global_step} steps, loss {done.training_loss:.4f}{speed}{most}"


def rates_of(trainer: Any, *, is_resumed: bool) -> dict[str, Any]:
    """Tokens per second, where the trainer counts them from the start, and the most memory so far, in bytes."""
    found: dict[str, Any] = {}
    log = trainer.state.log_history
    n_tokens = next((row["num_tokens"] for row in reversed(log) if "num_tokens" in row), None)
    seconds = next((row["train_runtime"] for row in reversed(log) if "train_runtime" in row), 0.0)
    if n_tokens and seconds and not is_resumed:
        found["tokens_per_second"] = n_tokens / seconds
    if torch.cuda.is_available() and not trainer.args.use_cpu:
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    elif (peak := peak_resident_bytes()) is not None:
        found["peak_memory_bytes"] = peak
    return found


def shown_batch(batch: dict[str, Tensor], tokenizer: Any) -> str:
    """The texts of a batch, with what is learned between brackets; of DPO all that is chosen, then all rejected."""
    labels = batch.get("labels")
    learned = batch["completion_mask"].bool() if labels is None else labels != IGNORED_LABEL
    read = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    lines = []
    for ids, are_learned, are_read in zip(batch["input_ids"], learned, read, strict=True):
        pieces, learns = [], False
        for token, is_learned in zip(ids[are_read].tolist(), are_learned[are_read].tolist(), strict=True):
            if is_learned != learns:
                learns = not learns
                pieces.append("[" if learns else "]")
            pieces.append(tokenizer.decode([token]))
        n_read, n_learned = int(are_read.sum()), int((are_learned & are_read).sum())
        lines.append(f"{n_read} tokens, {n_learned} learned: {''.join(pieces)}{']' if learns else ''}")
    return "\n".join(lines)
