"""Calibration data that the model writes itself: text and chats, sampled before it is quantized."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, GenerationMixin

from ..arguments import check_integer, check_model, check_number, check_tokenizer
from .blocks import evaluating
from .model_facts import max_length, predicts_next_token, vocabulary_size

# Stands for a user's message when a chat template is asked for what comes before it.
MESSAGE = "MESSAGE-OF-THE-USER"


def sample_calibration_data(
    model: Any,
    tokenizer: Any = None,
    *,
    n_tokens: int = 16_384,
    sequence_length: int = 512,
    temperature: float = 1.0,
    top_p: float = 0.95,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """Token ids that a language model samples, to calibrate its own quantization with.

    Half of the sequences begin with a random token and go on as text; where the tokenizer has a chat template, the
    other half begin where the template has the user speak, so that the model writes the question and the answer. So
    the data are of the kinds that the model was trained on, whatever text there is at hand: where a model is
    calibrated on one kind of text alone, its error on others is larger. Beginning with a random token is the way of
    LLM-QAT (https://arxiv.org/abs/2305.17888), beginning with an empty message that of Magpie
    (https://arxiv.org/abs/2406.08464).

    Args:
        model: a causal language model of transformers, before it is quantized, or with an adapter before a merge.
        tokenizer: for the chat template and the token that a text begins with; None for text alone.
        n_tokens: tokens to sample; rounded up to whole sequences.
        sequence_length: tokens of a sequence; fewer where the model has fewer positions.
        temperature: of the sampling.
        top_p: the likeliest tokens that have this probability together are sampled from.
        batch_size: sequences that are sampled at a time.
        seed: the same seed gives the same data on the same machine; torch's own generators are left as they were.
        progress: show a progress bar.

    Returns:
        (n_sequences, sequence_length) int64 on the CPU, to be given as ``data`` of a :class:`Calibration`, alone or
        joined with windows of a text.

    Raises:
        TypeError, ValueError: an argument is of a wrong kind; or ``model`` writes no text, or in a way of its own, as
            models of speech and diffusion do.
    """
    check_model("sample_calibration_data", model)
    check_tokenizer(tokenizer)
    check_integer("n_tokens", n_tokens, at_least=1, at_most=2**40)
    check_integer("sequence_length", sequence_length, at_least=2, at_most=2**24)
    check_integer("batch_size", batch_size, at_least=1, at_most=2**20)
    check_number("temperature", temperature, above=0.0, at_most=100.0)
    check_number("top_p", top_p, above=0.0, at_most=1.0)
    vocabulary = vocabulary_size(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # under an adapter
    writes = getattr(getattr(base, "generate", None), "__func__", None) is GenerationMixin.generate
    if vocabulary is None or not (writes and predicts_next_token(base)):
        raise ValueError(
            f"{type(model).__name__} does not write text: sample_calibration_data is for causal language models. Give "
            "texts or batches of your own as the calibration data."
        )
    length = min(sequence_length, max_length(model))
    n_sequences = -(-n_tokens // length)
    chat_start = _chat_start(tokenizer)
    n_chats = n_sequences // 2 if chat_start is not None and len(chat_start) < length else 0
    sampling = GenerationConfig(do_sample=True, temperature=temperature, top_p=top_p, top_k=0, pad_token_id=0)
    devices = [model.device] if model.device.type == "cuda" else []
    sampled = torch.empty(n_sequences, length, dtype=torch.int64)
    with (
        torch.random.fork_rng(devices),
        evaluating(model),
        _own_settings(base, sampling),
        tqdm(total=n_sequences, desc="Sampling", unit="sequence", disable=not progress) as bar,
    ):
        torch.manual_seed(seed)
        text_starts = _text_starts(tokenizer, vocabulary, n_sequences - n_chats)
        if length <= text_starts.shape[1]:
            raise ValueError(
                f"sequence_length={length} leaves nothing to write: a text begins with {text_starts.shape[1]} tokens "
                "here. Use more."
            )
        # Texts and chats by turns, so that the first of them are of both kinds too.
        kinds = [(sampled[:: 2 if n_chats else 1], text_starts)]
        if chat_start is not None and n_chats:
            kinds.append((sampled[1::2], chat_start.expand(n_chats, -1)))
        for rows, starts in kinds:
            for into, ids in zip(rows.split(batch_size), starts.to(model.device).split(batch_size), strict=True):
                mask, n_new = torch.ones_like(ids), length - ids.shape[1]
                into.copy_(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=n_new))
                bar.update(len(ids))
    return sampled


def _text_starts(tokenizer: Any, vocabulary: int, n: int) -> Tensor:
    """(n, 1) random tokens; (n, 2) where the tokenizer begins each text with a token of its own."""
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    usual = torch.tensor([token for token in range(vocabulary) if token not in special])
    starts = usual[torch.randint(len(usual), (n, 1))]
    first = None if tokenizer is None else tokenizer.bos_token_id
    if first is None or tokenizer("a").input_ids[:1] != [first]:
        return starts
    return torch.cat([torch.full_like(starts, first), starts], dim=1)


def _chat_start(tokenizer: Any) -> Tensor | None:
    """(n,) token ids of what the chat template writes before the first message of the user; None without one."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    chat = tokenizer.apply_chat_template([{"role": "user", "content": MESSAGE}], tokenize=False)
    start, is_there, _ = chat.partition(MESSAGE)
    ids = tokenizer(start, add_special_tokens=False).input_ids
    return torch.tensor(ids) if is_there and ids else None


@contextmanager
def _own_settings(model: Any, config: GenerationConfig) -> Iterator[None]:
    """``config`` in the place of the model's own, from which ``generate`` takes what is left open.

    So no token ends a sequence: after the end of a text the next one begins.
    """
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own
