"""What training a LoRA adapter takes: a step is run on the meta device, and one block of it in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.model_facts import predicts_next_token
from ..methods import QuantConfig
from ..training import prepare_model_for_kbit_training
from .estimates import Estimate
from .fused_attention import fused_attention
from .live_bytes import LiveBytes, bytes_of_imports
from .meta_model import one_block_model, quantized_on_meta
from .processor_time import processor_seconds

# What the Trainer, its data and the allocator take beside the tensors.
_TRAINER_BYTES = 2**26
# Tokens of a step that is followed on the meta device, where the loss goes tile by tile: so many that activations
# outweigh a tile. Those of one that is timed, and of its rows. More are scaled.
_FOLLOWED_TOKENS, _TIMED_TOKENS, _TIMED_LENGTH = 2**20, 2**12, 2**11


def estimate_training(
    model: PreTrainedModel,
    config: QuantConfig | None,
    lora: PeftConfig,
    *,
    batch_size: int = 1,
    sequence_length: int = 512,
    use_gradient_checkpointing: bool = True,
    is_timed: bool = True,
    loss_of: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> Estimate:
    """Memory, disk and time of training ``lora`` on ``model`` with AdamW.

    Args:
        model: on the meta device, float or quantized; it is changed.
        config: how it will be quantized; None if it is.
        lora: the adapter.
        batch_size, sequence_length: of one step.
        use_gradient_checkpointing: recompute activations in the backward pass.
        loss_of: the loss of a prepared model and token ids (batch, tokens), as the trainer computes it; None for the
            model's own, over all of its logits.
        is_timed: also run a step of one block with random numbers, which takes seconds.

    Returns:
        Estimate with the seconds of a step.

    Raises:
        ValueError: a float model without ``config``; a shape that the config does not fit.
    """
    imports = bytes_of_imports()
    is_followed = predicts_next_token(model)
    block = one_block_model(model, config) if is_timed and is_followed else None
    notes: list[str] = [] if is_followed else ["without activations: the model does not predict the next token"]
    quantized_on_meta(model, config)
    stored = {parameter: parameter.dtype for parameter in model.parameters()}
    prepared = _prepared(model, lora, use_gradient_checkpointing, low_cpu_mem_usage=True)
    weights = LiveBytes([*prepared.parameters(), *prepared.buffers()]).now
    activations = 0
    try:
        if is_followed:
            activations = _activations(prepared, loss_of or _own_loss, batch_size, sequence_length)
    except (NotImplementedError, RuntimeError) as error:
        notes.append(f"without activations: a step cannot be followed ({' '.join(str(error).split())[:80]})")
    adapter = sum(parameter.nbytes for parameter in prepared.parameters() if parameter.requires_grad)
    # Preparing casts them to float32; the pages of the file stay in memory as long as other weights lie in it.
    cast = sum(p.numel() * dtype.itemsize for p, dtype in stored.items() if p.dtype != dtype)
    seconds = None
    if block is not None:
        timed, text = _prepared(block, lora, use_gradient_checkpointing), model.config.get_text_config()
        seconds = _seconds(timed, text, batch_size, sequence_length)
    if is_timed and block is None:
        notes.append("without a time: the model is not a stack of blocks of one kind")
    return Estimate(
        step="train",
        memory={
            "libraries": imports + _TRAINER_BYTES,
            "weights": weights - adapter,
            "weights as stored": cast,
            "adapter": adapter,
            "optimizer": 2 * adapter,
            "gradients and activations": activations,
        },
        disk=adapter,
        seconds=seconds,
        per_step=True,
        notes=tuple(notes),
    )


def _prepared(model: PreTrainedModel, lora: PeftConfig, checkpointing: bool, **options: Any) -> nn.Module:
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    return get_peft_model(model, copy.deepcopy(lora), **options).train()


def _own_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def _activations(
    model: nn.Module, loss_of: Callable[[nn.Module, Tensor], Tensor], batch_size: int, sequence_length: int
) -> int:
    """Bytes beside the weights at the worst moment of a step; of large batches by two smaller ones."""

    def followed(n_rows: int) -> int:
        model.zero_grad(set_to_none=True)
        live = LiveBytes([*model.parameters(), *model.buffers()])
        weights = live.now
        with live, fused_attention():
            loss_of(model, torch.zeros(n_rows, sequence_length, dtype=torch.long, device="meta")).backward()
        return live.peak - weights

    few = max(1, _FOLLOWED_TOKENS // (2 * sequence_length))
    if batch_size <= 2 * few:
        return followed(batch_size)
    at_few, at_twice = followed(few), followed(2 * few)
    return at_twice + (at_twice - at_few) * (batch_size - 2 * few) // few


def _seconds(block: nn.Module, text: Any, batch_size: int, sequence_length: int) -> float:
    """Of a step: of ``block`` times the number of blocks that the config ``text`` says, and of the head and the loss.

    Timed with some of the tokens where they are many: what a row takes grows with its length and with its square.
    """
    most = min(sequence_length, _TIMED_LENGTH)
    n_rows = min(batch_size, max(1, _TIMED_TOKENS // most))
    of_block = _block_seconds(block, n_rows, most)
    if sequence_length > most:
        times = sequence_length / most
        square = min(of_block, max(0.0, 2 * (of_block - 2 * _block_seconds(block, n_rows, most // 2))))
        of_block = (of_block - square) * times + square * times**2
    tokens = min(batch_size * sequence_length, _TIMED_TOKENS)
    head = nn.Linear(text.hidden_size, text.vocab_size, bias=False).requires_grad_(False)
    hidden = torch.randn(tokens, text.hidden_size, requires_grad=True)
    wanted = torch.randint(0, text.vocab_size, (tokens,))
    of_head = _timed(lambda: nn.functional.cross_entropy(head(hidden), wanted).backward())
    return of_block * text.num_hidden_layers * batch_size / n_rows + of_head * batch_size * sequence_length / tokens


def _block_seconds(block: Any, n_rows: int, length: int) -> float:
    ids = torch.randint(0, block.config.vocab_size, (n_rows, length))
    return _timed(lambda: _own_loss(block, ids).backward())


def _timed(call: Callable[[], None]) -> float:
    """Of the second call: the first one warms up."""
    call()
    return processor_seconds(call)
