"""transformers' interface of experts: how a mixture's experts are computed where their weights are quantized.

A module whose class declares the interface asks it for a function by the name in its config. Ours sorts the tokens by
expert, and multiplies each expert's tokens with that expert's weight. Imports transformers only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "quantlayers"
# What models without quantized experts use.
_USUAL = "grouped_mm"
# Reads one expert at a time, by the architecture's own code: a choice of the user's that works.
_EAGER = "eager"


def use_quantized_experts(module: nn.Module) -> None:
    """Have the experts of ``module``, and of all others with its config, computed by :func:`experts_forward`.

    A config that says "eager" keeps that.
    """
    if NAME not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    config: Any = getattr(module, "config", None)
    if hasattr(config, "_experts_implementation_internal") and config._experts_implementation_internal != _EAGER:
        config._experts_implementation_internal = NAME


def use_usual_experts(module: nn.Module) -> None:
    """Undo :func:`use_quantized_experts`, for a module whose experts are dense again."""
    config: Any = getattr(module, "config", None)
    if getattr(config, "_experts_implementation_internal", None) == NAME:
        config._experts_implementation_internal = _USUAL


@contextmanager
def experts_by_calls(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While this is open, the experts of ``modules`` are computed by :func:`experts_forward`, whatever was chosen."""
    if NAME not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    configs: dict[int, Any] = {id(each): each for each in (getattr(module, "config", None) for module in modules)}
    found = [each for each in configs.values() if hasattr(each, "_experts_implementation_internal")]
    chosen = [config._experts_implementation_internal for config in found]
    for config in found:
        config._experts_implementation_internal = NAME
    try:
        yield
    finally:
        for config, implementation in zip(found, chosen, strict=True):
            config._experts_implementation_internal = implementation


def is_expert_parallel(module: nn.Module) -> bool:
    """Whether this process has only some of the experts of ``module``."""
    return bool(getattr(module, "_is_expert_parallel", False))


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The weighted sum of what each token's experts give.

    Each fused weight is called once, as a module, with all tokens sorted by expert: what hooks, and calibration, see.

    Args:
        self: the experts module. Each of its fused weights is a quantized stack, or the dense parameter.
        hidden_states: (n_tokens, hidden_size).
        top_k_index: experts of each token, (n_tokens, top_k), integer.
        top_k_weights: of these experts, (n_tokens, top_k).

    Returns:
        (n_tokens, hidden_size), dtype of ``hidden_states``.

    Raises:
        NotImplementedError: the experts are spread over processes.
    """
    if is_expert_parallel(self):
        raise NotImplementedError(
            "quantized experts are not spread over processes (expert parallelism). Load the model without ep_size."
        )
    n_tokens, top_k = top_k_index.shape
    experts = top_k_index.reshape(-1)
    order = experts.argsort(stable=True)
    counts = torch.bincount(experts, minlength=self.num_experts).tolist()
    tokens = order // top_k
    x = hidden_states[tokens]
    x = _product(self, "gate_up_proj" if self.has_gate else "up_proj", x, counts, tokens)
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    x = _product(self, "down_proj", x, counts, tokens)
    if self.has_post_expert_norm:
        x = self.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1)[order, None]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return x[place].view(n_tokens, top_k, -1).sum(1).to(hidden_states.dtype)


def _product(module: Any, name: str, x: Tensor, counts: list[int], tokens: Tensor) -> Tensor:
    """Each expert's part of ``x``, sorted by expert, times its weight, plus its bias."""
    weight = getattr(module, name)
    if isinstance(weight, nn.Module):
        y = weight(x, counts, tokens)
    else:
        parts = zip(x.to(weight.dtype).split(counts), weight.unbind(0), counts, strict=True)
        y = torch.cat([part @ each if module.is_transposed else linear(part, each) for part, each, n in parts if n])
    if module.has_bias:
        bias = getattr(module, f"{name}_bias")
        y = y + bias.repeat_interleave(torch.tensor(counts, device=bias.device), dim=0, output_size=len(y))
    return y
