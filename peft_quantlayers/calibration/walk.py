"""Walk through a model block by block, and give each layer statistics of its inputs.

A block's inputs are what the model makes of the outputs of the blocks before it, quantized or merged as they are by
then. Where a visitor asks for what the unchanged model has in their place, that runs beside, through a copy of the
block. Within a block the layers follow in the order in which they run; those that read the same input (q, k and v;
gate and up) share its statistics, collected after the layers before them were visited. Nothing is kept but the states
of the model's forward passes, one group's statistics, and on a CPU what the block has computed so far.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..layers.dense_stack import as_called_stacks, is_called_stack
from ..layers.expert_types import fused_weights
from .block_source import BlockSource, ModelBlocks
from .blocks import Call, moved
from .calibration_data import Calibration
from .expert_inputs import ExpertInputs, collect_experts
from .input_groups import layers_by_input
from .layer_passes import LayerPasses
from .model_calls import model_calls
from .model_passes import ModelPasses
from .process_group import ALONE, Processes
from .statistics import InputStatistics, Statistic, check_statistics, collect
from .unchanged_block import UnchangedBlock

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputGroup:
    """Layers that read one and the same input.

    Fields:
        names: of the layers, in the order in which they run.
        block: name of the block that they are in; empty outside of the blocks.
        statistics: of that input; None where the data never reached it.
        experts: of a stack of experts, which is a group of its own, what each expert reads; None of other layers.
    """

    names: tuple[str, ...]
    block: str
    statistics: InputStatistics | None
    experts: ExpertInputs | None = None

    def hessian(self, calibration: Calibration) -> Tensor | None:
        """The second moment, damped and shrunk as ``calibration`` says, in memory of its own; None without data."""
        if self.statistics is None:
            return None
        return self.statistics.hessian(damping=calibration.damping, shrinkage=calibration.used_shrinkage)

    def hessian_of_expert(self, expert: int, calibration: Calibration) -> Tensor | None:
        """:meth:`hessian` of one expert's own inputs, or of the stack's where they are shared or too few."""
        statistics = None if self.experts is None else self.experts.statistics_of(expert)
        if statistics is None:
            return self.hessian(calibration)
        return statistics.hessian(damping=calibration.damping, shrinkage=calibration.used_shrinkage)


class Visitor:
    """What is done with the layers on the way. Every method may change the model at the place it is told of."""

    statistics: tuple[Statistic, ...] = ()
    """What is collected of each input; see :class:`InputStatistics`."""

    processes: Processes = ALONE
    """Those that walk together; results of this one's :meth:`visit_group` have to be given to the others."""

    needs_targets = False
    """Whether :meth:`finish_block` wants the outputs of the blocks as they were."""

    @property
    def needs_originals(self) -> bool:
        """Whether the unchanged model runs beside the one that is changed."""
        return self.needs_targets or "deviation_moment" in self.statistics

    def begin(self, batches: Sequence[Tensor | Mapping[str, Any]]) -> None:
        """Before anything is changed, with all batches of the data; what is raised here refuses the walk."""

    def restore_block(self, block: str, names: list[str]) -> bool:
        """Put a block in its final state from elsewhere. True if so: its layers are not visited."""
        return False

    def visit_group(self, group: InputGroup) -> None:
        """Do the layers that read one input; by default each for itself, in order."""
        for name in group.names:
            self.visit(name, group.statistics)

    def visit(self, name: str, statistics: InputStatistics | None) -> None:
        """Do the layer ``name``; ``statistics`` is None where the data never reached it."""
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
        device: where blocks run and statistics live; None for where each block is.
        progress: show a progress bar.

    Raises:
        ValueError, TypeError: as :meth:`Calibration.batches`, and as :meth:`BlockSource.check`; nothing was changed.
    """
    check_statistics(visitor.statistics)
    batches = calibration.batches(model, progress=progress)
    calls = model_calls(model, batches)
    visitor.begin(batches)
    with as_called_stacks(model, names):
        walk_blocks(ModelBlocks(model, names, calls, device=device), visitor, progress=progress)


@torch.no_grad()
def walk_blocks(source: BlockSource, visitor: Visitor, *, progress: bool = True) -> None:
    """Visit the layers of ``source``; see :func:`walk`."""
    with source.ready(), ExitStack() as stack:
        source.check(progress=progress)
        n_layers = len(source.rest) + sum(len(source.layers(block)) for block in source.blocks)
        bar = stack.enter_context(tqdm(total=n_layers, desc="Calibrating", unit="layer", disable=not progress))
        visits = _Visits(visitor, bar)
        with source.passes() as passes, source.passes() as originals:
            for block in source.blocks:
                _walk_block(source, block, passes, originals if visitor.needs_originals else None, visits)
        model, calls = source.whole()
        with source.layer_passes(model, calls) as waiting:
            visits.in_order("", list(source.rest), waiting)
    if visitor.processes.is_first:
        visits.warn()


def _walk_block(
    source: BlockSource, name: str, passes: ModelPasses, originals: ModelPasses | None, visits: _Visits
) -> None:
    """Visit the layers of one block, and let ``passes`` have its outputs.

    ``originals`` are passes of the model as it was: they come to this block before it is changed.
    """
    names, home, visitor = source.layers(name), source.home(name), visits.visitor
    is_last = name == source.blocks[-1]
    with source.opened(name) as block, ExitStack() as stack:
        unchanged = None
        if originals is not None:
            runs_beside = "deviation_moment" in visitor.statistics
            unchanged = stack.enter_context(UnchangedBlock(block, name, originals, home, runs_beside=runs_beside))
        calls = passes.arrive(name)
        waiting = stack.enter_context(source.layer_passes(block, calls))
        is_restored = visitor.restore_block(name, names)
        if is_restored:
            visits.bar.update(len(names))
        else:
            visits.in_order(name, names, waiting, unchanged)
        targets = None if unchanged is None or (is_last and not visitor.needs_targets) else unchanged.finish()
        if not is_restored and visitor.finish_block(
            name, names, BlockWork(block, calls, targets if visitor.needs_targets else None)
        ):
            waiting.close()
        if not is_last:
            passes.give(moved(output, home) for output in waiting.outputs())


@dataclass
class _Visits:
    """The visits of layers, and what is said of them in the end.

    Fields:
        visitor: what is done.
        bar: counts the layers.
        unreached: layers that no data reached, or zeros only.
        reached: the others.
        scarce: layers with more inputs than tokens, to these two numbers.
        scarce_experts: of stacks, the experts that take the stack's second moment, since they saw too few tokens.
    """

    visitor: Visitor
    bar: tqdm
    unreached: list[str] = field(default_factory=list)
    reached: list[str] = field(default_factory=list)
    scarce: dict[str, tuple[int, int]] = field(default_factory=dict)
    scarce_experts: dict[str, list[int]] = field(default_factory=dict)

    def in_order(
        self, block: str, names: list[str], passes: LayerPasses, unchanged: UnchangedBlock | None = None
    ) -> None:
        """Visit the layers ``names`` of a block in the order in which they run; those that never run come last."""
        beside = None if unchanged is None else unchanged.beside
        start = len(block) + 1 if block else 0
        groups, unreached = layers_by_input(passes, [name[start:] for name in names])
        for inside in groups:
            if is_called_stack(passes.block.get_submodule(inside[0])):
                self._visit_stack(block, inside[0], passes)
                continue
            # Closed whatever happens: while it is open, the layers' forwards are not their own.
            with closing(passes.inputs(inside, beside=beside)) as inputs:
                statistics = collect(inputs, self.visitor.statistics, processes=self.visitor.processes)
            widths = [getattr(passes.block.get_submodule(name), "in_features", 0) for name in inside]
            group = InputGroup(tuple(f"{block}.{name}" if block else name for name in inside), block, statistics)
            if statistics is None:
                self.unreached += group.names
            else:
                self.reached += group.names
                self.scarce |= {
                    name: (width, statistics.n_tokens)
                    for name, width in zip(group.names, widths, strict=True)
                    if width > statistics.n_tokens
                }
            self._visit(group)
        for name in unreached:
            whole_name = f"{block}.{name}" if block else name
            self.unreached.append(whole_name)
            module: Any = passes.block.get_submodule(name)
            experts = ExpertInputs(len(module)) if is_called_stack(module) else None
            self._visit(InputGroup((whole_name,), block, None, experts))

    def _visit_stack(self, block: str, inside: str, passes: LayerPasses) -> None:
        """Visit a stack of experts, which reads tokens sorted by expert."""
        module: Any = passes.block.get_submodule(inside)
        parent, _, parameter = inside.rpartition(".")
        # The first weight of an experts module reads the block's tokens, any other what the expert made of them.
        is_shared = fused_weights(passes.block.get_submodule(parent))[0].parameter == parameter
        with closing(passes.sorted_inputs(inside)) as inputs:
            statistics, experts = collect_experts(
                inputs,
                self.visitor.statistics,
                n_experts=len(module),
                is_shared=is_shared,
                processes=self.visitor.processes,
            )
        name, width = f"{block}.{inside}" if block else inside, module.in_features
        if statistics is None:
            self.unreached.append(name)
        else:
            self.reached.append(name)
            if width > statistics.n_tokens:
                self.scarce[name] = (width, statistics.n_tokens)
            elif not is_shared and (scarce := experts.scarce(width)):
                self.scarce_experts[name] = scarce
        self._visit(InputGroup((name,), block, statistics, experts))

    def _visit(self, group: InputGroup) -> None:
        self.visitor.visit_group(group)
        self.bar.update(len(group.names))

    def warn(self) -> None:
        """Say which layers the data did not reach, and where their inputs outnumber the tokens."""
        if self.unreached:
            parts = _parts_without(self.unreached, self.reached)
            shown = parts[:8]
            logger.warning(
                "%d of %d layers get no inputs from the calibration data, or only zeros, and are quantized without "
                "calibration: those in %s. To calibrate them give batches with what they read (images, ...); "
                "to leave them dense, quantize with skip_modules=%s.",
                len(self.unreached),
                len(self.unreached) + len(self.reached),
                ", ".join(shown) + (f" and {len(parts) - 8} more" if len(parts) > 8 else ""),
                shown,
            )
        if self.scarce:
            widest = max(self.scarce, key=lambda name: self.scarce[name])
            logger.warning(
                "%d of %d layers have more inputs (%s: %d) than the %d tokens of the calibration data, so damping "
                "alone decides what the tokens leave open. Give more data, or a larger n_tokens.",
                len(self.scarce),
                len(self.reached),
                widest,
                *self.scarce[widest],
            )

        if self.scarce_experts:
            shown = [f"{name}: {', '.join(map(str, found))}" for name, found in self.scarce_experts.items()]
            logger.warning(
                "%d expert(s) saw fewer tokens of the calibration data than they have inputs, and are quantized with "
                "the second moment of all experts beside them: %s. Give more data, or a larger n_tokens.",
                sum(map(len, self.scarce_experts.values())),
                "; ".join(shown[:4]) + (f"; and in {len(shown) - 4} more stacks" if len(shown) > 4 else ""),
            )


def _parts_without(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """The largest modules that hold all of ``names`` and none of ``others``; as patterns, for one in every block."""
    taken = {".".join(other.split(".")[:end]) for other in others for end in range(1, other.count(".") + 2)}
    taken_patterns = {_pattern(name) for name in taken}
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        largest = next((prefix for prefix in prefixes if prefix not in taken), name)
        found[largest if _pattern(largest) in taken_patterns else _pattern(largest)] = None
    return list(found)


def _pattern(name: str) -> str:
    """``name`` with ``*`` for each index in a list."""
    return ".".join("*" if part.isdigit() and at else part for at, part in enumerate(name.split(".")))
