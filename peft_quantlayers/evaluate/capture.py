"""Capture: how much of an adapter's effect on a model's predictions a merge retains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Divergences of float32 logits that differ by rounding only are some 1e-8.
SMALLEST_KL = 1e-6

# (1, n_tokens) token ids to logits (1, n_tokens, vocabulary).
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Capture:
    """Three models on the same held-out tokens: the base, the base with its adapter, and the merged model.

    Fields:
        kl_adapter_base, kl_adapter_merged: mean divergence of the next-token distribution from the adapter's, nats.
        loss_base, loss_adapter, loss_merged: mean negative log-likelihood of the tokens, nats.
        n_tokens: number of scored tokens.
    """

    kl_adapter_base: float
    kl_adapter_merged: float
    loss_base: float
    loss_adapter: float
    loss_merged: float
    n_tokens: int

    @property
    def is_measurable(self) -> bool:
        """Whether the adapter changes the predictions by more than rounding does."""
        return self.kl_adapter_base > SMALLEST_KL

    @property
    def capture(self) -> float:
        """``1 - KL(adapter || merged) / KL(adapter || base)``: 1 retains all; below 0 is worse than no adapter."""
        if self.kl_adapter_base <= 0:
            return 1.0 if self.kl_adapter_merged <= 0 else float("-inf")
        return 1.0 - self.kl_adapter_merged / self.kl_adapter_base


@torch.no_grad()
def capture(
    adapter: Logits,
    base: Logits,
    merged: Logits,
    token_ids: Tensor,
    *,
    window: int = 512,
    max_windows: int | None = None,
) -> Capture:
    """Compare the predictions of a base model, the same with an adapter, and the merged model, window by window.

    All three run on one window before the next, so that at most the logits of three windows are in memory. They may
    be one model that is switched between states. Put it into ``eval`` mode first.

    Args:
        adapter, base, merged: each gives logits (1, n_tokens, vocabulary) for token ids (1, n_tokens); for example
            ``lambda ids: model(ids, use_cache=False).logits``.
        token_ids: held-out text, (n_tokens,), integer, on the models' device. An incomplete last window is not used.
        window: tokens per window, each scored on its own.
        max_windows: use only this many, from the first; None for all.

    Raises:
        ValueError: ``token_ids`` is not a vector of at least one window, or ``window`` is below 2.
    """
    if window < 2:
        raise ValueError(f"window={window} must be at least 2: the first token of a window is not scored.")
    if token_ids.dim() != 1 or token_ids.numel() < window:
        raise ValueError(
            f"token_ids of shape {tuple(token_ids.shape)} must be a vector of at least one window of {window} tokens. "
            "Give a longer text, or a smaller window."
        )
    n_windows = min(token_ids.numel() // window, max_windows or token_ids.numel())
    kl_base = kl_merged = 0.0
    losses = [0.0, 0.0, 0.0]
    for ids in token_ids[: n_windows * window].view(n_windows, window):
        reference = _log_probs(adapter, ids)
        losses[1] += _loss(reference, ids)
        for position, model in ((0, base), (2, merged)):
            log_probs = _log_probs(model, ids)
            losses[position] += _loss(log_probs, ids)
            kl = float((reference.exp() * (reference - log_probs)).sum())
            if position == 0:
                kl_base += kl
            else:
                kl_merged += kl
    n_scored = n_windows * (window - 1)
    return Capture(
        kl_adapter_base=kl_base / n_scored,
        kl_adapter_merged=kl_merged / n_scored,
        loss_base=losses[0] / n_scored,
        loss_adapter=losses[1] / n_scored,
        loss_merged=losses[2] / n_scored,
        n_tokens=n_scored,
    )


def _log_probs(model: Logits, ids: Tensor) -> Tensor:
    return model(ids[None])[0, :-1].float().log_softmax(-1)


def _loss(log_probs: Tensor, ids: Tensor) -> float:
    return -float(log_probs.gather(1, ids[1:, None]).sum())
