"""Formats whose files another program's converter makes: it gets a dense model with stand-ins (:mod:`..stand_ins`)."""

from __future__ import annotations

import dataclasses
import shutil
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..bit_strings import pack_rows
from ..config_json import engine_config
from ..export_report import LayerExport
from ..source_layer import SourceLayer
from ..stand_ins import StandIns, write_stand_ins
from ..target_grid import requantized_facts
from ..uniform_grid import UniformGrid
from .format_base import Approximation, Comparison, ExportTask, LayerFacts, Written
from .grid_format import GridFormat, GridSettings, StoredGrid

# Widths of unsigned integers that both runtimes read.
_CONTAINERS = (2, 4, 8)


class ConvertedFormat(GridFormat):
    """A format of grids with a converter of its engine.

    Attributes:
        converter: its name, for messages.
    """

    converter: ClassVar[str]

    def write(self, task: ExportTask) -> Written:
        scratch = task.folder.parent / f"{self.name}-scratch"
        try:
            write_stand_ins(task, scratch / "dense", self.dense_dtype(task))
            return self.write_converted(task, scratch / "dense", scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def dense_dtype(self, task: ExportTask) -> torch.dtype:
        """Of the model that the converter gets."""
        return task.dtype

    @abstractmethod
    def write_converted(self, task: ExportTask, dense: Path, scratch: Path) -> Written:
        """Have the model in ``dense`` converted, and write it with codes in the place of its stand-ins.

        Args:
            task: what is exported, and where to.
            dense: the folder of the model with stand-ins.
            scratch: an own folder, which is deleted afterwards.
        """

    def quantization_config(
        self, settings: Mapping[str, GridSettings], dense_linears: Sequence[str]
    ) -> dict[str, Any]:
        return {}  # graphs and GGUF files say it of each tensor

    def model_misfit(
        self, facts: Sequence[LayerFacts], dense_linears: Collection[str], approximate: Approximation | None
    ) -> str:
        return ""

    def facts_to_write(self, task: ExportTask) -> dict[str, LayerFacts]:
        """Of each layer as it will be written."""
        return dict(task.facts) if task.requantized is None else requantized_facts(task.facts, self)


class ContainerFormat(ConvertedFormat):
    """Codes in containers of 2, 4 and 8 bits, scales and zeros: what :meth:`stand_ins` puts into a graph.

    The tensors of a layer: ``codes``, uint8 (out_features, in_features * container / 8), the lowest bits first;
    ``scale`` and ``zero``, (out_features, n_groups), in the export's dtype, or uint8 for zeros that must be codes.
    """

    widths = (1, 2, 3, 4, 5, 6, 8)
    has_float_zeros = True
    needs_tokenizer = True
    adapter_form = None
    bytes_per_weight = 9.0  # the dense stand-ins, twice, and the codes

    def dense_dtype(self, task: ExportTask) -> torch.dtype:
        return torch.float32

    def store(self, grid: UniformGrid, dtype: torch.dtype) -> StoredGrid:
        nbits = next(width for width in _CONTAINERS if width >= grid.nbits)
        scale = grid.scale.to(dtype)
        zero = grid.zero.to(dtype if self.holds_float_zeros(grid.nbits) else torch.uint8)
        read = dataclasses.replace(grid, scale=scale.float(), zero=zero.float())
        codes = pack_rows(grid.codes, nbits).view(torch.uint8)
        return StoredGrid(
            tensors={"codes": codes, "scale": scale, "zero": zero},
            weight=read.dequantize(),
            settings=GridSettings(nbits=nbits, group_size=grid.group_size, is_symmetric=False),
        )

    def stand_ins(self, task: ExportTask) -> StandIns:
        """What takes the place of stand-ins in the graph; a kind is the container's width and the group size."""
        facts = self.facts_to_write(task)

        def kind(each: LayerFacts) -> tuple[int, int]:
            nbits, group_size = self.kind(each, task.approximate)
            return next(width for width in _CONTAINERS if width >= nbits), group_size or each.group_size

        def store(layer: SourceLayer) -> tuple[dict[str, Tensor], LayerExport]:
            (matrix,), comparison = layer.matrices, Comparison(task, layer)
            stored, _ = self.stored(task, layer, task.weight(layer), matrix)
            comparison.add(matrix, stored.weight)
            stored_as = f"{stored.settings.nbits} bits in groups of {stored.settings.group_size}"
            n_bytes = sum(tensor.nbytes for tensor in stored.tensors.values())
            return stored.tensors, comparison.result(stored_as=stored_as, bits_after=8 * n_bytes / layer.n_weights)

        return StandIns(task, self.converter, {name: kind(each) for name, each in facts.items()}, store)


def written_in_graph(task: ExportTask, stand_ins: StandIns) -> Written:
    """What was written, once all stand-ins have given their places."""
    stand_ins.check_complete()
    return Written(
        layers=stand_ins.reports(),
        config=engine_config(task.source.config, task.dtype),
    )
