"""How often a mixture of experts sends a token to the same experts as another model does."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arguments import check_model
from .held_out import check_token_ids

# What the experts modules of transformers call the experts of each token, (n_tokens, top_k), integer.
INDEX_NAMES = ("top_k_index", "router_indices", "selected_experts")


@dataclass(frozen=True, kw_only=True)
class RoutingAgreement:
    """The choices of two mixtures on the same held-out tokens.

    Fields:
        per_layer: fraction of the tokens whose set of chosen experts is the same, by the reference's layer.
        n_tokens: number of tokens compared in each layer.
    """

    per_layer: Mapping[str, float]
    n_tokens: int

    @property
    def total(self) -> float:
        """Mean over the layers: the fraction of all choices of experts that are the same."""
        return statistics.fmean(self.per_layer.values())


@torch.no_grad()
def routing_agreement(
    model: Any,
    reference: Any,
    token_ids: Tensor,
    *,
    window: int = 512,
    max_windows: int | None = None,
    progress: bool = True,
) -> RoutingAgreement:
    """Compare the experts that ``model`` and ``reference`` choose for each token, window by window.

    A token counts as the same in a layer if all its experts are, whatever their order and weights. Its inputs there
    are each model's own, so a layer's figure includes what the layers before it changed.

    Args:
        model, reference: mixtures with the same layers; both run on one window before the next. Either may carry
            adapters.
        token_ids: held-out text, (n_tokens,), integer. An incomplete last window is not used.
        window: tokens that a model reads together.
        max_windows: use only this many, from the first; None for all.
        progress: show a progress bar.

    Raises:
        TypeError: no models, or ``token_ids`` is not a tensor of integers.
        ValueError: the text is shorter than one window, a model has no experts, or the two have other layers.
    """
    for each in (model, reference):
        check_model("routing_agreement", each)
    n_windows = check_token_ids(token_ids, window=window, max_windows=max_windows)
    same: dict[str, int] = {}
    windows = token_ids[: n_windows * window].view(-1, window)
    with _choices_of(model) as choose, _choices_of(reference) as choose_reference:
        for ids in tqdm(windows, desc="Comparing", unit="window", disable=not progress):
            found, wanted = choose(ids), choose_reference(ids)
            if len(found) != len(wanted):
                raise ValueError(
                    f"the model has {len(found)} layers with experts and the reference {len(wanted)}: only models of "
                    "the same layers can be compared."
                )
            for (name, theirs), ours in zip(wanted.items(), found.values(), strict=True):
                if ours.shape != theirs.shape:
                    raise ValueError(
                        f"{name}: the model chooses {tuple(ours.shape)} experts and the reference "
                        f"{tuple(theirs.shape)} (tokens, experts of each): only models of the same layers can be "
                        "compared."
                    )
                same[name] = same.get(name, 0) + int((ours == theirs).all(-1).sum())
    n_tokens = n_windows * window
    return RoutingAgreement(per_layer={name: n / n_tokens for name, n in same.items()}, n_tokens=n_tokens)


# (n_tokens,) token ids to the experts of each token, (n_tokens, top_k), sorted, by the layer's name.
Choices = Callable[[Tensor], dict[str, Tensor]]


@contextmanager
def _choices_of(model: Any) -> Iterator[Choices]:
    """What tells the choices of ``model``: its experts modules, by hooks for the length of the context; or, of an
    architecture that tells them no numbers of experts (Llama 4), its router logits."""
    found: dict[str, Tensor] = {}
    handles = []

    def watch(name: str, forward: inspect.Signature, index: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[name] = forward.bind_partial(module, *args, **kwargs).arguments[index].cpu().sort(-1).values

        return note

    for name, module in model.named_modules():
        forward = inspect.signature(type(module).forward)
        index = next((each for each in INDEX_NAMES if each in forward.parameters), None)
        if index is not None:
            handles.append(module.register_forward_pre_hook(watch(name, forward, index), with_kwargs=True))

    def choose(ids: Tensor) -> dict[str, Tensor]:
        found.clear()
        options = {} if handles else {"output_router_logits": True}
        output = model(input_ids=ids[None].to(model.device), use_cache=False, **options)
        return dict(found) if handles else _largest(output, model.config)

    was_training = model.training
    model.eval()
    try:
        yield choose
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


def _largest(output: Any, config: Any) -> dict[str, Tensor]:
    """The experts with the largest router logits."""
    logits = getattr(output, "router_logits", None)
    top_k = getattr(config.get_text_config(), "num_experts_per_tok", None)
    if not logits or top_k is None:
        raise ValueError(
            "the model has no experts modules that are told the experts of each token, and gives no router logits. "
            "routing_agreement is for mixtures of experts."
        )
    return {f"router {at}": each.topk(top_k, -1).indices.cpu().sort(-1).values for at, each in enumerate(logits)}
