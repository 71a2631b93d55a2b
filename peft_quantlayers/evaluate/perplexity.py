"""Perplexity of a causal language model on a text, in windows that do not overlap."""

import math
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..arguments import check_model
from .held_out import check_token_ids


@torch.no_grad()
def perplexity(
    model: Any,
    token_ids: Tensor,
    *,
    window: int = 512,
    max_windows: int | None = None,
    progress: bool = True,
) -> float:
    """``exp`` of the mean negative log-likelihood of the tokens, each given those before it in its window.

    Args:
        model: a transformers causal language model.
        token_ids: the whole text, (n_tokens,), integer.
        window: tokens per window; each window is scored on its own, without its first token. An incomplete last
            window is not scored.
        max_windows: score only this many windows, from the first; None for all.
        progress: show a progress bar.

    Raises:
        TypeError: not a causal language model, or ``token_ids`` is not a tensor of integers.
        ValueError: the text is shorter than one window, ``window`` below 2, or ``max_windows`` below 1.
    """
    check_model("perplexity", model)
    check_causal(model)
    text = token_ids.reshape(-1) if isinstance(token_ids, Tensor) else token_ids
    n_windows = check_token_ids(text, window=window, max_windows=max_windows)
    # accelerate moves the inputs of a model that it has offloaded to meta.
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    windows = text[: n_windows * window].view(n_windows, window).to(device)
    was_training = model.training
    model.eval()
    total = 0.0
    try:
        for ids in tqdm(windows, desc="Perplexity", unit="window", disable=not progress):
            logits = model(ids[None], use_cache=False).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
    finally:
        model.train(was_training)
    return math.exp(total / (n_windows * (window - 1)))


def is_causal(model: Any) -> bool:
    """Whether ``model`` predicts each token from those before it."""
    can_generate = getattr(model, "can_generate", lambda: True)
    return can_generate() and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def check_causal(model: Any) -> None:
    """Raise TypeError for a model that does not predict each token from those before it."""
    if not is_causal(model):
        raise TypeError(
            f"perplexity is of causal language models, which predict each token from those before it, and "
            f"{type(model).__name__} does not. Measure it by the loss that its forward gives for labels."
        )
