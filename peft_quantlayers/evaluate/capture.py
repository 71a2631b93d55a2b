"""Capture: how much of an adapter's effect on a model's predictions a merge retains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..arguments import check_callable
from .held_out import check_token_ids

# Divergences of float32 logits that differ by rounding only are some 1e-8.
SMALLEST_KL = 1e-6
# A smaller gain in loss, in nats, is within what one text differs from another: no fraction of it is given.
SMALLEST_GAIN = 0.01
# A target that is not scored, as in torch's cross_entropy.
IGNORED_TARGET = -100

# (1, n_tokens) token ids to logits (1, n_tokens, vocabulary).
Logits = Callable[[Tensor], Tensor]
Inputs = TypeVar("Inputs")


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

    @property
    def gain_retained(self) -> float | None:
        """Fraction of the adapter's gain in loss that the merge retains: 1 for all, below 0 for worse than no adapter.

        None if the adapter lowers the loss by less than 0.01: a fraction of that says nothing.
        """
        gain = self.loss_base - self.loss_adapter
        return (self.loss_base - self.loss_merged) / gain if gain >= SMALLEST_GAIN else None


@torch.no_grad()
def capture(
    adapter: Logits,
    base: Logits,
    merged: Logits,
    token_ids: Tensor,
    *,
    window: int = 512,
    max_windows: int | None = None,
    progress: bool = False,
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
        progress: show a progress bar.

    Raises:
        TypeError: ``token_ids`` is not a tensor of integers, or a model cannot be called.
        ValueError: ``token_ids`` is not a vector of at least one window, ``window`` is below 2, or ``max_windows``
            below 1.
    """
    for name, model in (("adapter", adapter), ("base", base), ("merged", merged)):
        if model is None:
            raise TypeError(f"{name} must be a function from token ids to logits, got None.")
        check_callable(name, model, "token ids")
    n_windows = check_token_ids(token_ids, window=window, max_windows=max_windows)
    windows = token_ids[: n_windows * window].view(n_windows, 1, window)

    def without_last(model: Logits) -> Logits:
        return lambda ids: model(ids)[:, :-1]

    scored = [(ids, ids[:, 1:]) for ids in windows]
    return compare_predictions(
        without_last(adapter), without_last(base), without_last(merged), scored, progress=progress
    )


@torch.no_grad()
def compare_predictions(
    adapter: Callable[[Inputs], Tensor],
    base: Callable[[Inputs], Tensor],
    merged: Callable[[Inputs], Tensor],
    batches: Sequence[tuple[Inputs, Tensor]],
    *,
    progress: bool = False,
) -> Capture:
    """As :func:`capture`, for inputs of any kind.

    Args:
        adapter, base, merged: each gives logits (..., n_classes) for the inputs of a batch.
        batches: inputs, and the class that is right at each place of the logits, (...), -100 where none is scored.
        progress: show a progress bar.

    Raises:
        ValueError: nothing is scored.
    """
    n_scored = sum(int((targets != IGNORED_TARGET).sum()) for _, targets in batches)
    if not n_scored:
        raise ValueError("nothing to score: every label of the held-out data is -100.")
    kl_base = kl_merged = 0.0
    losses = [0.0, 0.0, 0.0]
    for inputs, targets in tqdm(batches, desc="Evaluating", unit="batch", disable=not progress):
        reference, loss = _log_probs(adapter(inputs), targets)
        losses[1] += loss
        for position, model in ((0, base), (2, merged)):
            log_probs, loss = _log_probs(model(inputs), targets)
            losses[position] += loss
            kl = float((reference.exp() * (reference - log_probs)).sum())
            if position == 0:
                kl_base += kl
            else:
                kl_merged += kl
    return Capture(
        kl_adapter_base=kl_base / n_scored,
        kl_adapter_merged=kl_merged / n_scored,
        loss_base=losses[0] / n_scored,
        loss_adapter=losses[1] / n_scored,
        loss_merged=losses[2] / n_scored,
        n_tokens=n_scored,
    )


def _log_probs(logits: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    """Log probabilities at the scored places, (n, n_classes), and the sum of their losses."""
    targets = targets.to(logits.device)
    is_scored = targets != IGNORED_TARGET
    log_probs = logits[is_scored].float().log_softmax(-1)
    return log_probs, -float(log_probs.gather(1, targets[is_scored][:, None]).sum())
