"""The trainer of ``train`` around a model that is hardly there: what it refuses, it refuses before hours of work."""

from __future__ import annotations

import copy
import math
import tempfile
from typing import Any

from jsonargparse import Namespace
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from .trained_base import Rehearsed
from .training_checks import check_something_is_learned
from .trl_trainers import trainer_of

_WIDTH = 8


def rehearse(
    settings: Namespace, rows: Any, eval_rows: Any, tokenizer: Any, *, n_rows: int | None = None
) -> Rehearsed | None:
    """Make the trainer that the settings ask for, its batches, its optimizer and its schedule, and no step.

    The data is read and tokenized in full, or ``n_rows`` of it, which are no batch. Errors are those of the trainer. A
    run that is sharded, or distributed by an engine of its own, is not rehearsed. Without ``n_rows`` the result says
    what will be read.
    """
    if settings.fsdp_size is not None or settings.training.get("deepspeed") or settings.training.get("fsdp"):
        return None
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    arguments_type, trainer_type = trainer_of(settings.trainer)
    if n_rows is not None:
        rows, eval_rows = (
            each if each is None else each.select(range(min(n_rows, len(each)))) for each in (rows, eval_rows)
        )
    had_bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            given = {**copy.deepcopy(vars(settings.training)), "push_to_hub": False}
            trainer: Any = trainer_type(
                model=_smallest_model(len(tokenizer)),
                args=arguments_type(**given, output_dir=scratch),
                train_dataset=rows,
                eval_dataset=eval_rows,
                processing_class=copy.deepcopy(tokenizer),
                peft_config=LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"),
            )
            if n_rows is None:
                check_something_is_learned(trainer, data=rows, eval_data=eval_rows)
                next(iter(trainer.get_train_dataloader()))
            if not settings.training.get("optim_target_modules"):  # names of the real model's layers
                trainer.create_optimizer_and_scheduler(num_training_steps=2)
            return _read_by(trainer) if n_rows is None else None
    finally:
        if had_bars:
            enable_progress_bars()


def _read_by(trainer: Any) -> Rehearsed:
    args, rows = trainer.args, trainer.train_dataset
    per_epoch = max(1, len(trainer.get_train_dataloader()) // args.gradient_accumulation_steps)
    n_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    longest = max(map(len, rows["input_ids"]), default=None) if "input_ids" in rows.column_names else None
    return Rehearsed(n_steps=n_steps, longest_row=longest)


def _smallest_model(vocab_size: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=_WIDTH,
            intermediate_size=_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=_WIDTH,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
