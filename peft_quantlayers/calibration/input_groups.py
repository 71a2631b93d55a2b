"""Which layers read one and the same input, and in which order they run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from .blocks import Stop, input_of, run_until
from .layer_passes import LayerPasses


def layers_by_input(passes: LayerPasses, names: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Names in the order in which their modules run, those with one and the same input together; and unreached ones.

    Modules that the first call does not reach come last, each for itself.
    """
    groups: list[list[str]] = []
    missing = list(names)
    for number in range(passes.n_calls):
        if not missing:
            break
        here = partial(_groups_of_call, passes, number // passes.processes.size, missing)
        ran = passes.processes.of_one(number, here)
        groups += [[name] for group in ran for name in group] if number else ran
        missing = [name for name in missing if not any(name in group for group in ran)]
    return groups, missing


def _groups_of_call(passes: LayerPasses, index: int, names: Sequence[str]) -> list[list[str]]:
    """As :func:`layers_by_input`, for one call of this process."""
    found: list[list[str]] = []
    inputs: list[Tensor] = []  # held, so that no other tensor takes a place in memory that was seen before

    def recorder(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if any(name in group for group in found):
                return
            x = input_of(args, kwargs)
            same = next((i for i, seen in enumerate(inputs) if seen is x), None)
            if same is None:
                inputs.append(x)
                found.append([name])
            else:
                found[same].append(name)
            if sum(map(len, found)) == len(names):
                raise Stop

        return hook

    run_until(passes.block, passes.calls[index], {name: recorder(name) for name in names})
    return found
