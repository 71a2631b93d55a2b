"""Perplexity of a causal language model on a text, in windows that do not overlap."""

import math
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm


@torch.no_grad()
def perplexity(
    model: Any,
    token_ids: Tensor,
    *,
    window: int = 512,
    max_windows: int | None = None,
    progress: bool = False,
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
        ValueError: the text is shorter than one window, ``window`` below 2, or ``max_windows`` below 1.
    """
    if window < 2:
        raise ValueError(f"window={window} must be at least 2: the first token of a window is not scored.")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows={max_windows} must be at least 1, or None for all.")
    n_windows = token_ids.numel() // window
    if n_windows == 0:
        raise ValueError(
            f"the text has {token_ids.numel()} tokens, fewer than one window of {window}. Give a longer text, or a "
            "smaller window."
        )
    n_windows = min(n_windows, max_windows or n_windows)
    # accelerate moves the inputs of a model that it has offloaded to meta.
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    windows = token_ids[: n_windows * window].view(n_windows, window).to(device)
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
