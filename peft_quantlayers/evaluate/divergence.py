"""How far a model's predictions are from another's: divergence of the next-token distributions, and agreement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arguments import check_model
from .held_out import check_token_ids
from .perplexity import is_causal


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Two models on the same held-out tokens.

    Fields:
        kl: mean ``KL(reference || model)`` of the next-token distributions, nats.
        top1_agreement: fraction of the tokens after which both have the same most likely token.
        n_tokens: number of predictions compared.
        perplexity, reference_perplexity: as :func:`perplexity` gives them; NaN of models that do not predict the next
            token.
    """

    kl: float
    top1_agreement: float
    n_tokens: int
    perplexity: float = math.nan
    reference_perplexity: float = math.nan


@torch.no_grad()
def divergence(
    model: Any,
    reference: Any,
    token_ids: Tensor,
    *,
    window: int = 512,
    max_windows: int | None = None,
    progress: bool = True,
) -> Divergence:
    """Compare the predictions of ``model`` with those of ``reference``, window by window.

    Args:
        model, reference: causal language models of the same vocabulary; both run on one window before the next.
        token_ids: held-out text, (n_tokens,), integer. An incomplete last window is not used.
        window: tokens that are predicted together, each from those before it in its window.
        max_windows: use only this many, from the first; None for all.
        progress: show a progress bar.

    Raises:
        TypeError: no models, or ``token_ids`` is not a tensor of integers.
        ValueError: the text is shorter than one window, or the vocabularies differ.
    """
    for each in (model, reference):
        check_model("divergence", each)
    n_windows = check_token_ids(token_ids, window=window, max_windows=max_windows)
    kl = agreed = 0.0
    losses = [0.0, 0.0]
    for ids in tqdm(token_ids[: n_windows * window].view(-1, window), desc="Comparing", disable=not progress):
        ours, theirs = (
            each(ids[None].to(each.device), use_cache=False).logits[0].float().log_softmax(-1).cpu()
            for each in (model, reference)
        )
        if ours.shape != theirs.shape:
            raise ValueError(
                f"the model predicts {ours.shape[-1]} tokens and the reference {theirs.shape[-1]}: only models of the "
                "same vocabulary can be compared."
            )
        kl += float((theirs.exp() * (theirs - ours)).sum(-1).double().sum())
        agreed += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
        for place, log_probs in enumerate((ours, theirs)):
            losses[place] += nn.functional.nll_loss(log_probs[:-1], ids[1:].cpu().long(), reduction="sum").item()
    n_tokens = n_windows * window
    means = [loss / (n_windows * (window - 1)) for loss in losses]
    ours_ppl, their_ppl = (
        _exp(mean) if is_causal(each) else math.nan for each, mean in zip((model, reference), means, strict=True)
    )
    return Divergence(
        kl=kl / n_tokens,
        top1_agreement=agreed / n_tokens,
        n_tokens=n_tokens,
        perplexity=ours_ppl,
        reference_perplexity=their_ppl,
    )


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
