"""Walk through a model block by block, and give each layer the second moment of its inputs.

A block's inputs come from the blocks before it as they are by then, quantized or merged. Within a block the layers
follow in the order in which they run; those that read the same input (q, k and v; gate and up) share one second
moment, measured after the layers before them were visited. Nothing is kept but hidden states, one second moment, and
on a CPU what the block has computed so far.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .blocks import Call, device_of, evaluating, find_blocks, input_of, model_calls, record_calls, run_until
from .data import Calibration
from .waiting_passes import Passes

logger = logging.getLogger(__name__)

# Tokens whose outer products are formed at a time, which bounds the float32 copy of half-precision inputs.
MOMENT_TOKENS = 8192


class Visitor:
    """What is done with the layers on the way. Every method may change the model at the place it is told of."""

    needs_targets = False
    """Whether :meth:`finish_block` wants the outputs of the blocks as they were."""

    def begin(self, batches: list[Tensor]) -> None:
        """Before anything is changed, with the inputs that the walk uses; what is raised here refuses the walk."""

    def restore_block(self, block: str, names: list[str]) -> bool:
        """Put a block in its final state from elsewhere. True if so: its layers are not visited."""
        return False

    def visit(self, name: str, hessian: Tensor | None) -> None:
        """Do the layer ``name``; ``hessian`` is None where the data never reached it."""
        raise NotImplementedError

    def finish_block(self, block: str, names: list[str], work: BlockWork) -> bool:
        """After the last layer of a block. True if this changed the block once more."""
        return False


@dataclass(frozen=True)
class BlockWork:
    """A block after its layers were visited: the calls that it gets now, and the outputs it should give.

    ``targets`` are those of the model before the walk, from the original inputs on; None unless asked for.
    """

    block: nn.Module
    calls: list[Call]
    targets: list[Tensor] | None


@torch.no_grad()
def walk(
    model: nn.Module,
    names: list[str],
    calibration: Calibration,
    visitor: Visitor,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> None:
    """Visit the modules ``names`` of ``model``.

    Args:
        model: any module whose forward takes what ``calibration`` gives. While this runs it is in evaluation mode,
            and in its own dtype, whatever autocast is on.
        names: modules to visit, each called with its input as first argument.
        calibration: the data; checked before anything is done.
        visitor: what to do.
        device: where blocks run and Hessians live; None for where each block is.
        progress: show a progress bar.

    Raises:
        ValueError, TypeError: as :meth:`Calibration.batches`; nothing was changed.
    """
    batches = calibration.batches(model)
    _warn_of_few(batches, model, names)
    visitor.begin(batches)
    blocks = find_blocks(model, names)
    in_blocks = {block: [name for name in names if name.startswith(f"{block}.")] for block in blocks}
    with (
        evaluating(model),
        _without_autocast(model),
        tqdm(total=len(names), desc="Calibrating", unit="layer", disable=not progress) as bar,
    ):
        recorded = record_calls(model, blocks, batches) if blocks else {}
        hidden = [call.hidden for call in recorded[blocks[0]]] if blocks else []
        targets = list(hidden) if visitor.needs_targets else None
        for block_name in blocks:
            block = model.get_submodule(block_name)
            home = next(block.parameters()).device
            block.to(device or home)
            inside = in_blocks[block_name]
            if targets is not None:
                original = [call.with_hidden(h) for call, h in zip(recorded[block_name], targets, strict=True)]
                targets = [call(block).to(home) for call in original]
            calls = [call.with_hidden(h) for call, h in zip(recorded.pop(block_name), hidden, strict=True)]
            with Passes(block, calls) as passes:
                if visitor.restore_block(block_name, inside):
                    bar.update(len(inside))
                else:
                    _visit_in_order(block_name, inside, passes, calibration, visitor, bar)
                    if visitor.finish_block(block_name, inside, BlockWork(block, calls, targets)):
                        passes.close()
                hidden = [output.to(home) for output in passes.outputs()]
            block.to(home)
        rest = [name for name in names if not any(name in inside for inside in in_blocks.values())]
        with Passes(model, model_calls(model, batches)) as passes:
            _visit_in_order("", rest, passes, calibration, visitor, bar)


def _warn_of_few(batches: list[Tensor], model: nn.Module, names: list[str]) -> None:
    """Say so where a layer has more inputs than there are tokens, whose second moment cannot tell them apart."""
    n_tokens = sum(len(batch) if batch.is_floating_point() else batch.numel() for batch in batches)
    widths = {name: getattr(model.get_submodule(name), "in_features", 0) for name in names}
    n_wider = sum(width > n_tokens for width in widths.values())
    if n_wider:
        widest = max(widths, key=lambda name: widths[name])
        logger.warning(
            "%d of %d layers have more inputs (%s: %d) than the %d tokens of the calibration data: what these do not "
            "show rests on damping. Give more data, or a larger n_tokens.",
            n_wider,
            len(names),
            widest,
            widths[widest],
            n_tokens,
        )


def _without_autocast(model: nn.Module) -> torch.autocast:
    return torch.autocast(device_of(model, torch.device("cpu")).type, enabled=False)


def _visit_in_order(
    prefix: str, names: list[str], passes: Passes, calibration: Calibration, visitor: Visitor, bar: tqdm
) -> None:
    start = len(prefix) + 1 if prefix else 0
    for stage in stages(passes.block, [name[start:] for name in names], passes.calls):
        # Closed whatever happens: while it is open, the layers' forwards are not their own.
        with closing(passes.inputs(stage)) as inputs:
            moment = second_moment(inputs)
        hessian = (
            None if moment is None else damped(moment, damping=calibration.damping, shrinkage=calibration.shrinkage)
        )
        for inner in stage:
            name = f"{prefix}.{inner}" if prefix else inner
            if hessian is None:
                logger.warning("%s: no calibration data but zeros reaches this layer; it is done without.", name)
            visitor.visit(name, hessian)
            bar.update()


def stages(parent: nn.Module, names: list[str], calls: list[Call]) -> list[list[str]]:
    """Names in the order in which their modules run, those with one and the same input together.

    Modules that the first call does not reach come last, each for itself.
    """
    if not names:
        return []
    found: list[list[str]] = []
    inputs: list[Tensor] = []  # held, so that no other tensor takes a place in memory that was seen before

    def recorder(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if any(name in stage for stage in found):
                return
            x = input_of(args, kwargs)
            same = next((i for i, seen in enumerate(inputs) if seen is x), None)
            if same is None:
                inputs.append(x)
                found.append([name])
            else:
                found[same].append(name)

        return hook

    run_until(parent, calls[0], {name: recorder(name) for name in names})
    return found + [[name] for name in names if not any(name in stage for stage in found)]


def second_moment(inputs: Iterable[Tensor]) -> Tensor | None:
    """Mean of ``x x.T`` over all tokens of ``inputs``, float32; None if there are none, or only zeros."""
    total, n_tokens = torch.zeros((), dtype=torch.float32), 0
    for x in inputs:
        tokens = x.detach().reshape(-1, x.shape[-1])
        total = total.to(tokens.device)
        for part in tokens.split(MOMENT_TOKENS):
            part = part.float()
            total = total.addmm_(part.t(), part) if total.dim() else part.t() @ part
        n_tokens += len(tokens)
    return total.div_(n_tokens) if n_tokens and total.diagonal().sum() > 0 else None


def damped(moment: Tensor, *, damping: float, shrinkage: float) -> Tensor:
    """``moment`` as far as it is trusted.

    What lies beside the diagonal shrinks by the part ``shrinkage``, and ``damping`` times the mean of the diagonal is
    added to the diagonal.
    """
    diagonal = moment.diagonal()
    result = moment * (1 - shrinkage)
    result.diagonal().copy_(diagonal + damping * diagonal.mean())
    return result
