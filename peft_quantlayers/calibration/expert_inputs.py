"""What single experts of a mixture read during calibration, and the second moments of it.

The first product of every expert reads the tokens of the block, so one second moment serves the whole stack. The next
one reads what its own expert made of them, in channels of its own: each expert has a second moment, computed when it
is asked for, so that the inputs are kept and not a matrix per expert. An expert that saw fewer tokens than it has
inputs takes the stack's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import Call
from .process_group import ALONE, Processes
from .statistics import InputStatistics, Statistic, collect


class SortedInput(NamedTuple):
    """What one call of a stack reads.

    Fields:
        x: (n, in_features), sorted by expert.
        experts: of each row, (n,).
    """

    x: Tensor
    experts: Tensor

    @classmethod
    def of(cls, call: Call, args: tuple[Any, ...]) -> SortedInput:
        """From the arguments of :meth:`QuantizedStack.forward`, without the tokens that are padding in ``call``."""
        x, counts, tokens = args
        experts = torch.repeat_interleave(torch.tensor(list(counts), device=x.device))
        masks = [mask for mask in call.masks if mask.numel() > int(tokens.max() if len(tokens) else 0)]
        if not masks:
            return cls(x, experts)
        is_real = torch.stack([mask.flatten().to(x.device)[tokens] for mask in masks]).all(0)
        return cls(x[is_real], experts[is_real])


@dataclass(eq=False)
class ExpertInputs:
    """The inputs of each expert of a stack.

    Fields:
        n_experts: of the stack.
        n_tokens: rows that each expert has read.
        rows: these, in parts; empty where one second moment serves all.
    """

    n_experts: int
    n_tokens: list[int] = field(default_factory=list)
    rows: dict[int, list[Tensor]] = field(default_factory=dict)

    def statistics_of(self, expert: int) -> InputStatistics | None:
        """Of the inputs of one expert alone; None if it saw fewer tokens than it has inputs, or none were kept."""
        rows = self.rows.get(expert)
        if rows is None or self.n_tokens[expert] < rows[0].shape[-1]:
            return None
        return collect(rows, ("second_moment",))

    def scarce(self, in_features: int) -> list[int]:
        """Experts that saw fewer tokens than they have inputs."""
        return [expert for expert, n in enumerate(self.n_tokens) if n < in_features]


def collect_experts(
    inputs: Iterable[SortedInput],
    wanted: tuple[Statistic, ...],
    *,
    n_experts: int,
    is_shared: bool,
    processes: Processes = ALONE,
) -> tuple[InputStatistics | None, ExpertInputs]:
    """Statistics over all rows, and the inputs of single experts, which are kept unless they are shared."""
    found = ExpertInputs(n_experts)
    counts = torch.zeros(n_experts, dtype=torch.long)

    def rows() -> Iterator[Tensor]:
        for x, experts in inputs:
            here = torch.bincount(experts, minlength=n_experts)
            counts.add_(here.cpu())
            for expert, part in enumerate([] if is_shared else x.detach().split(here.tolist())):
                if len(part):
                    found.rows.setdefault(expert, []).append(part.clone())
            yield x

    statistics = collect(rows(), wanted, processes=processes)
    found.n_tokens = counts.tolist()
    return statistics, found
