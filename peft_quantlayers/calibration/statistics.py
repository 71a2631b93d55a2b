"""What is known of the inputs of layers after calibration: only what was asked for, in one pass, in bounded memory.

Tensors in, one value out; no model is run here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .process_group import ALONE, Processes

Statistic = Literal["second_moment", "deviation_moment", "mean_square", "max_abs", "mean_abs", "inputs", "first_half"]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)
Moment = Literal["second_moment", "deviation_moment"]
MEANS: tuple[Statistic, ...] = ("second_moment", "deviation_moment", "mean_square", "mean_abs")

# Tokens that are worked on at a time, which bounds the float32 copy of half-precision inputs.
TOKENS_AT_A_TIME = 8192
# Tokens that are kept where the inputs themselves are asked for.
MAX_KEPT_TOKENS = 8192


@dataclass(kw_only=True, eq=False)
class InputStatistics:
    """Statistics over the calibration tokens of one input, which one or more layers read.

    A moment takes as much memory as a square weight, so none is copied that need not be, and :meth:`drop` gives back
    those that nothing needs any more.

    Fields (float32, on the device of the inputs; None where not asked for):
        n_tokens: tokens seen.
        second_moment: mean of ``x x.T``, (in_features, in_features).
        deviation_moment: mean of ``(x_float - x) x.T``, (in_features, in_features), where ``x_float`` is what the
            unchanged model has in the place of ``x``; None also where that is not known token by token. It is
            ``E[x_float x.T]`` less the second moment, without the cancellation.
        mean_square: mean of ``x * x``, its diagonal, (in_features,).
        max_abs: largest ``abs(x)``, (in_features,).
        mean_abs: mean of ``abs(x)``, (in_features,).
        inputs: the inputs themselves, at most ``MAX_KEPT_TOKENS`` spread evenly over all tokens,
            (n_kept, in_features).
        first_half: of the statistics that are means, the same over the first half of each call's tokens, with which
            there are two that are independent of each other: :meth:`halves`, :meth:`half_moment`,
            :meth:`half_products`.
    """

    n_tokens: int
    second_moment: Tensor | None = None
    deviation_moment: Tensor | None = None
    mean_square: Tensor | None = None
    max_abs: Tensor | None = None
    mean_abs: Tensor | None = None
    inputs: Tensor | None = None
    first_half: InputStatistics | None = None

    @property
    def has_halves(self) -> bool:
        """Whether the first half was asked for, and no half is empty."""
        return self.first_half is not None and 0 < self.first_half.n_tokens < self.n_tokens

    def halves(self, names: Sequence[Statistic] = MEANS) -> tuple[InputStatistics, InputStatistics] | None:
        """Those of ``names`` that are there, over two halves of the tokens; None if not :attr:`has_halves`."""
        first = self.first_half
        if first is None or not self.has_halves:
            return None
        pairs = {name: (getattr(self, name), getattr(first, name)) for name in names}
        means: dict[str, Any] = {
            name: self._of_second_half(whole, half)
            for name, (whole, half) in pairs.items()
            if whole is not None and half is not None
        }
        return first, InputStatistics(n_tokens=self.n_tokens - first.n_tokens, **means)

    def half_moment(self, half: Literal[0, 1], name: Moment) -> Tensor:
        """The moment ``name`` of the first or the second half, in memory of its own."""
        whole, first = self._both(name)
        return self._of_second_half(whole, first) if half else first.clone()

    def half_products(self, x: Tensor, name: Moment) -> tuple[Tensor, Tensor]:
        """``x @ moment``, (n, in_features) float32, with the moment ``name`` of the first and of the second half.

        The moment of the second half is not made for it.
        """
        whole, first = (x @ moment.to(x.device) for moment in self._both(name))
        return first, self._of_second_half(whole, first)

    def _both(self, name: Moment) -> tuple[Tensor, Tensor]:
        whole, first = getattr(self, name), getattr(self.first_half, name, None)
        if whole is None or first is None or not self.has_halves:
            raise ValueError(f'there are no two halves of {name}; name it and "first_half" in Visitor.statistics.')
        return whole, first

    def _of_second_half(self, whole: Tensor, first: Tensor) -> Tensor:
        """What depends linearly on the means of the second half, from that of all tokens and of the first half."""
        assert self.first_half is not None
        n_first = self.first_half.n_tokens
        n_second = self.n_tokens - n_first
        return (whole * (self.n_tokens / n_second)).sub_(first, alpha=n_first / n_second)

    def drop(self, *names: Statistic) -> None:
        """Give back the memory of statistics that are needed no more."""
        for name in names:
            setattr(self, name, None)

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


class PairedInput(NamedTuple):
    """What a layer reads, (..., in_features), and the same tokens in the unchanged model; None if not known."""

    x: Tensor
    original: Tensor | None


def collect(
    inputs: Iterable[Tensor | PairedInput], wanted: Sequence[Statistic], *, processes: Processes = ALONE
) -> InputStatistics | None:
    """The statistics ``wanted`` of all tokens of ``inputs``, (..., in_features) each; None if none but zeros come.

    The deviation moment needs pairs, and is None unless all of them know their tokens in the unchanged model.
    ``processes``, which are all given the same inputs, share the sums: each makes some of them, from all inputs.
    """
    check_statistics(wanted)
    first, second = (_Sums([name for name in wanted if name not in ("inputs", "first_half")]) for _ in range(2))
    for number, (name, half) in enumerate((name, half) for name in list(first.names) for half in (first, second)):
        if number % processes.size != processes.rank:
            half.of_others.add(name)
    kept = _KeptTokens(MAX_KEPT_TOKENS)
    is_zero = True
    for given in inputs:
        x, original = given if isinstance(given, PairedInput) else PairedInput(given, None)
        tokens = x.detach().reshape(-1, x.shape[-1])
        others = None if original is None else original.detach().reshape(tokens.shape)
        # Unless halves are wanted, all is added up in one place, in the order in which it comes.
        middle = len(tokens) // 2 if "first_half" in wanted else 0
        for half, start, stop in ((first, 0, middle), (second, middle, len(tokens))):
            for at in range(start, stop, TOKENS_AT_A_TIME):
                rows = slice(at, min(at + TOKENS_AT_A_TIME, stop))
                part = tokens[rows].float()
                is_zero = is_zero and not part.any()
                if "inputs" in wanted:
                    kept.add(part, at=first.n_tokens + second.n_tokens)
                half.add(part, None if others is None else others[rows].float())
    for sums in processes.gathered(lambda: (first.sums, second.sums)):
        first.sums |= sums[0]
        second.sums |= sums[1]
    both = first.plus(second)
    if is_zero or not both.are_numbers():
        return None
    return InputStatistics(
        **both.means(),
        inputs=kept.tokens() if "inputs" in wanted else None,
        first_half=InputStatistics(**first.means()) if first.n_tokens else None,
    )


class _Sums:
    """Sums over tokens, or largest values, of the statistics ``names``; those ``of_others`` are made elsewhere."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.n_tokens = list(names), 0
        self.of_others: set[str] = set()
        self.sums: dict[str, Tensor] = {}

    def add(self, x: Tensor, original: Tensor | None) -> None:
        """Take the tokens ``x``, (n, in_features) float32; ``original``: the same in the unchanged model."""
        self.n_tokens += len(x)
        if original is None:
            self.drop("deviation_moment")
        for name in self.names:
            if name in self.of_others:
                continue
            if name == "second_moment":
                self._add_product(name, x, x)
            elif name == "deviation_moment" and original is not None:
                self._add_product(name, original - x, x)
            elif name == "max_abs":
                self._add(name, x.abs().amax(0))
            else:
                self._add(name, (x.square() if name == "mean_square" else x.abs()).sum(0))

    def drop(self, name: str) -> None:
        """Leave a statistic out that cannot be had."""
        if name in self.names:
            self.names.remove(name)
            self.sums.pop(name, None)

    def plus(self, other: _Sums) -> _Sums:
        """Both together, in the memory of ``other``."""
        for name in set(other.names) - set(self.names):
            other.drop(name)
        for name, part in self.sums.items():
            if name in other.names:
                other._add(name, part if name in other.sums else part.clone())
        other.n_tokens += self.n_tokens
        return other

    def are_numbers(self) -> bool:
        """Whether none of them is NaN."""
        return not any(total.isnan().any() for total in self.sums.values())

    def means(self) -> dict[str, Any]:
        """The fields of :class:`InputStatistics`, in the memory of the sums."""
        means = {name: total.div_(self.n_tokens) if name in MEANS else total for name, total in self.sums.items()}
        return {"n_tokens": self.n_tokens, **means}

    def _add_product(self, name: str, left: Tensor, right: Tensor) -> None:
        before = self.sums.get(name)
        self.sums[name] = left.t() @ right if before is None else before.addmm_(left.t(), right)

    def _add(self, name: str, values: Tensor) -> None:
        before = self.sums.get(name)
        if before is None:
            self.sums[name] = values
        else:
            self.sums[name] = torch.maximum(before, values) if name == "max_abs" else before.add_(values)


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
