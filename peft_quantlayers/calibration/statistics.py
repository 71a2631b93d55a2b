"""What is known of the inputs of layers after calibration: only what was asked for, in one pass, in bounded memory.

Tensors in, one value out; no model is run here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Statistic = Literal["second_moment", "mean_square", "max_abs", "mean_abs", "inputs"]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)

# Tokens that are worked on at a time, which bounds the float32 copy of half-precision inputs.
TOKENS_AT_A_TIME = 8192
# Tokens that are kept where the inputs themselves are asked for.
MAX_KEPT_TOKENS = 8192


@dataclass(frozen=True, kw_only=True, eq=False)
class InputStatistics:
    """Statistics over the calibration tokens of one input, which one or more layers read.

    Fields (float32, on the device of the inputs; None where not asked for):
        n_tokens: tokens seen.
        second_moment: mean of ``x x.T``, (in_features, in_features).
        mean_square: mean of ``x * x``, its diagonal, (in_features,).
        max_abs: largest ``abs(x)``, (in_features,).
        mean_abs: mean of ``abs(x)``, (in_features,).
        inputs: the inputs themselves, at most ``MAX_KEPT_TOKENS`` spread evenly over all tokens,
            (n_kept, in_features).
    """

    n_tokens: int
    second_moment: Tensor | None = None
    mean_square: Tensor | None = None
    max_abs: Tensor | None = None
    mean_abs: Tensor | None = None
    inputs: Tensor | None = None

    def hessian(self, *, damping: float, shrinkage: float = 0.0) -> Tensor:
        """The second moment as far as it is trusted, (in_features, in_features) float32; a tensor of its own.

        Args:
            damping: times the mean of the diagonal, added to the diagonal.
            shrinkage: fraction by which off-diagonal entries are shrunk towards zero.

        Raises:
            ValueError: the second moment was not asked for.
        """
        if self.second_moment is None:
            raise ValueError('a Hessian needs the statistic "second_moment"; name it in Visitor.statistics.')
        diagonal = self.second_moment.diagonal()
        result = self.second_moment * (1 - shrinkage)
        result.diagonal().copy_(diagonal + damping * diagonal.mean())
        return result


def check_statistics(wanted: Sequence[str]) -> None:
    """ValueError where one of ``wanted`` is not a statistic."""
    if unknown := [name for name in wanted if name not in STATISTICS]:
        raise ValueError(f"{unknown[0]!r} is not a statistic of inputs; choose from {list(STATISTICS)}.")


def collect(inputs: Iterable[Tensor], wanted: Sequence[Statistic]) -> InputStatistics | None:
    """The statistics ``wanted`` of all tokens of ``inputs``, (..., in_features) each; None if none but zeros come."""
    check_statistics(wanted)
    sums: dict[str, Tensor] = {}
    kept, n_tokens = _KeptTokens(MAX_KEPT_TOKENS), 0
    is_zero = True
    for x in inputs:
        tokens = x.detach().reshape(-1, x.shape[-1])
        for part in tokens.split(TOKENS_AT_A_TIME):
            part = part.float()
            _add(sums, part, wanted)
            if "inputs" in wanted:
                kept.add(part, at=n_tokens)
            if not sums and is_zero:
                is_zero = not part.any()
            n_tokens += len(part)
    if not n_tokens or (is_zero if not sums else not _total(sums) > 0):
        return None
    means = {name: total if name == "max_abs" else total.div_(n_tokens) for name, total in sums.items()}
    return InputStatistics(n_tokens=n_tokens, inputs=kept.tokens() if "inputs" in wanted else None, **means)


def _add(sums: dict[str, Tensor], x: Tensor, wanted: Sequence[Statistic]) -> None:
    """Take the tokens ``x``, (n, in_features) float32, into ``sums``."""
    for name in wanted:
        before = sums.get(name)
        if name == "second_moment":
            sums[name] = x.t() @ x if before is None else before.addmm_(x.t(), x)
        elif name == "mean_square":
            sums[name] = x.square().sum(0) if before is None else before.add_(x.square().sum(0))
        elif name == "mean_abs":
            sums[name] = x.abs().sum(0) if before is None else before.add_(x.abs().sum(0))
        elif name == "max_abs" and len(x):
            largest = x.abs().amax(0)
            sums[name] = largest if before is None else torch.maximum(before, largest)


def _total(sums: dict[str, Tensor]) -> float:
    """Positive unless all inputs were zero; NaN where one was."""
    name, total = next(iter(sums.items()))
    return float((total.diagonal() if name == "second_moment" else total).sum())


class _KeptTokens:
    """Every ``stride``-th token of a stream, ``most`` at most: when they become too many, every second one goes."""

    def __init__(self, most: int) -> None:
        self.most, self.stride = most, 1
        self.parts: list[Tensor] = []

    def add(self, x: Tensor, *, at: int) -> None:
        """Tokens (n, in_features), the first of which is number ``at`` of the stream."""
        self.parts.append(x[-at % self.stride :: self.stride].clone())
        while sum(map(len, self.parts)) > self.most:
            self.parts = [torch.cat(self.parts)[::2].clone()]
            self.stride *= 2

    def tokens(self) -> Tensor:
        return torch.cat(self.parts)
