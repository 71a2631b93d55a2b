"""Calibrated quantization of a model in files: the walk of :mod:`..calibration` over one block at a time."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..calibration import Calibration, LayerResult
from ..calibration.model_calls import batch_tensors, model_calls
from ..calibration.process_group import ALONE, Processes
from ..calibration.quantize_calibrated import QuantizeVisitor, calibration_options
from ..calibration.walk import BlockWork, InputGroup, walk_blocks
from ..formats.quantized_weight import stored_bytes
from ..storage.free_memory import return_free_memory
from .checkpoint_parts import PartsOfModel
from .folder_blocks import FolderBlocks
from .work_folder import WorkFolder

logger = logging.getLogger(__name__)

Batches = Sequence[Tensor | Mapping[str, Any]]


def describe_calibration(calibration: Calibration, batches: Batches) -> dict[str, Any]:
    """What determines the result, as JSON: how the data is used, and its SHA-256."""
    digest = hashlib.sha256()
    for tensor in batch_tensors(list(batches)):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(stored_bytes(tensor.reshape(-1)))
    return calibration_options(calibration) | {"sha256": digest.hexdigest()}


def quantize_calibrated_parts(
    parts: PartsOfModel,
    work: WorkFolder,
    calibration: Calibration,
    batches: Batches,
    *,
    progress: bool,
    on_layer: Callable[[LayerResult], None] | None = None,
    together: Processes = ALONE,
) -> None:
    """Make all parts that ``work`` does not have, block by block.

    Processes ``together`` all call this, each with ``parts`` and ``work`` of its own, of which the first keeps parts.
    Each has every block, with its share of the calls; second moments and layers are shared out too. Finetuning goes
    from call to call, so with it each process has all calls, and does the same.

    Raises:
        ValueError: as :meth:`BlockSource.check`; a layer that cannot be quantized.
    """
    numbers = range(len(parts.parts))
    if all(work.is_finished(number) for number in numbers):
        for number in numbers:
            parts.take(work, number)
        return
    calls = model_calls(parts.checkpoint.model, batches)
    source = FolderBlocks(parts, work, calls, together=together, shares_calls=calibration.finetune_epochs == 0)
    visitor = _StreamingVisitor(source, calibration, on_layer)
    source.needs_originals = visitor.needs_originals
    walk_blocks(source, visitor, progress=progress)
    if not together.is_first:
        return
    if source.unreached:
        logger.warning(
            "the calibration data does not reach %d block(s), such as %s: their layers are quantized without "
            "calibration. To calibrate them give batches with what they read (images, ...).",
            len(source.unreached),
            source.unreached[0],
        )
    for number in (parts.number_of[block] for block in source.unreached):
        if work.is_finished(number):
            parts.take(work, number)
        else:
            parts.make(work, number)


class _StreamingVisitor(QuantizeVisitor):
    """Stores each block as soon as it is finished, and takes finished ones from there."""

    def __init__(
        self, source: FolderBlocks, calibration: Calibration, on_layer: Callable[[LayerResult], None] | None
    ) -> None:
        parts = source.parts
        super().__init__(
            parts.checkpoint.model,
            parts.specs,
            parts.config,
            calibration,
            parts.device,
            on_layer,
            processes=source.together,
        )
        self.source = source

    def restore_block(self, block: str, names: list[str]) -> bool:
        return self.source.restore(block)

    def visit_group(self, group: InputGroup) -> None:
        return_free_memory()  # of the statistics, and of the group before
        super().visit_group(group)

    def finish_block(self, block: str, names: list[str], work: BlockWork) -> bool:
        is_changed = super().finish_block(block, names, work)
        self.source.parts.keep(self.source.work, self.source.parts.number_of[block])
        return is_changed
