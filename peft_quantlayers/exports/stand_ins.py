"""Other programs' converters make the graph or the file; the codes of quantized layers get into it by stand-ins.

A converter moves, splits, joins and transposes weights, each architecture's otherwise. So it is given a dense model in
which the weight of a quantized layer is a stand-in, whose rows say which ones they are. What it made of them tells
where each row belongs, and there codes take its place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config_json import engine_config, write_config
from .export_report import LayerExport
from .formats.format_base import ExportTask
from .sharded_writer import ShardedWriter
from .source_layer import Matrix, SourceLayer

# A stand-in for a weight says in each row which row of all it is, in so many digits to this base, which every dtype
# holds.
_BASE, _DIGITS = 128, 5
# Columns after which the digits are repeated, each with its own meaning.
_PERIOD = 8
_MARK = 127.0


def stand_in(rows: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """A weight (len(rows), in_features) whose rows say which ones they are.

    The converter moves the rows of some weights, splits others, and stacks those of experts. With this in the place of
    a weight one can read off where each row went, and do the same with codes.

    Args:
        rows: the number of each row among those of all layers, int64.
        in_features: columns.
        dtype: any floating one; all of them hold the digits.
    """
    columns = torch.arange(in_features)
    by_column = [columns // _PERIOD % _BASE, columns // (_PERIOD * _BASE)]
    weight = torch.empty(len(rows), in_features, dtype=dtype)
    for place in range(_DIGITS):
        weight[:, place::_PERIOD] = (rows // _BASE**place % _BASE).to(dtype).unsqueeze(1)
    for place, digits in enumerate(by_column, start=_DIGITS):
        weight[:, place::_PERIOD] = digits[place::_PERIOD].to(dtype)
    weight[:, _PERIOD - 1 :: _PERIOD] = _MARK
    return weight


def rows_of_stand_in(weight: Tensor) -> Tensor | None:
    """The number of each row of ``weight``, float32; None if it is no :func:`stand_in`.

    Raises:
        ValueError: it is one, but its numbers or columns were changed.
    """
    if weight.dim() != 2 or weight.shape[1] < _PERIOD or not (weight[:, _PERIOD - 1] == _MARK).all():
        return None
    digits = weight[:, :_DIGITS].long()
    rows = (digits * _BASE ** torch.arange(_DIGITS)).sum(1)
    columns = torch.arange(weight.shape[1])
    for place, each in enumerate([*digits.unbind(1), columns // _PERIOD % _BASE, columns // (_PERIOD * _BASE)]):
        expected = each.unsqueeze(1) if place < _DIGITS else each[place::_PERIOD]
        if not (weight[:, place::_PERIOD] == expected).all():
            raise ValueError("the converter changes the weights or the order of their inputs")
    return rows


def write_stand_ins(task: ExportTask, folder: Path, dtype: torch.dtype) -> None:
    """The model of ``task`` in ``folder``, dense, with a stand-in for each quantized weight, and its tokenizer."""
    folder.mkdir(parents=True)
    for file in task.folder.iterdir():  # tokenizer and generation config
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    writer = ShardedWriter(folder)
    first = 0
    for layer in task.source.layers.values():

        def stands_for(matrix: Matrix, first: int = first, layer: SourceLayer = layer) -> Tensor:
            start = first + (matrix.expert or 0) * layer.out_features
            rows = torch.arange(start + matrix.rows.start, start + matrix.rows.stop)
            return stand_in(rows, layer.in_features, dtype)

        for name, weight in layer.float_tensors(stands_for):
            writer.add(name, weight)
        first += layer.n_rows
    for name, tensor in task.source.dense_tensors(dtype):
        writer.add(name, tensor)
    writer.close()
    write_config(folder, engine_config(task.source.config, dtype))


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where rows of layers are in a tensor that a converter made.

    Fields:
        layers, rows: number of the layer and its row, int64, of each row of the tensor.
        is_transposed: these are the tensor's columns.
    """

    layers: Tensor
    rows: Tensor
    is_transposed: bool = False


class StandIns:
    """Finds the stand-ins of a model in what a converter made, and gives what takes their places."""

    def __init__(
        self,
        task: ExportTask,
        converter: str,
        kinds: Mapping[str, Any],
        store: Callable[[SourceLayer], tuple[dict[str, Tensor], LayerExport]],
    ) -> None:
        """
        Args:
            task: whose layers they are, in the order of :func:`write_stand_ins`.
            converter: its name, for messages.
            kinds: how each layer is stored, by its name; those in one tensor must be of one kind.
            store: gives the tensors of a layer, with its rows (of all experts) as their first axis, and its report.
        """
        self._layers = list(task.source.layers.values())
        self._converter = converter
        self._kinds = kinds
        self._store = store
        self._reports: dict[str, LayerExport] = {}
        self._last: tuple[str, dict[str, Tensor]] | None = None
        n_rows = torch.tensor([0, *(layer.n_rows for layer in self._layers)])
        self._first_rows = n_rows.cumsum(0)  # of each layer among those of all, and their number
        self._n_found = torch.zeros(len(self._layers), dtype=torch.int64)

    def place(self, tensor_name: str, parts: Iterable[Tensor], *, may_be_transposed: bool = False) -> Place | None:
        """Where the rows of a tensor are from; None if it is no stand-in.

        Args:
            tensor_name: for messages.
            parts: the tensor, floating, or the matrices of a stack one after the other.
            may_be_transposed: whether its columns may be rows of layers.

        Raises:
            ValueError: the converter has changed the weights, not only moved them.
        """
        found: list[Tensor] = []
        is_transposed = False
        try:
            for values in parts:
                rows = rows_of_stand_in(values)
                if rows is None and may_be_transposed:
                    rows, is_transposed = rows_of_stand_in(values.t()), True
                if rows is None:
                    return None
                found.append(rows)
        except ValueError as error:
            raise ValueError(
                f"{tensor_name}: {error}, which codes cannot follow. Dequantize the model "
                "(peft_quantlayers.dequantize_model), and export it in 16 bits. Nothing was written."
            ) from None
        numbers = torch.cat(found)
        layers = torch.searchsorted(self._first_rows, numbers, right=True) - 1
        self._n_found += torch.bincount(layers, minlength=len(self._layers))
        return Place(layers=layers, rows=numbers - self._first_rows[layers], is_transposed=is_transposed)

    def check_complete(self) -> None:
        """Raise ValueError unless every row of every layer has one place."""
        counts = zip(self._layers, self._n_found.tolist(), strict=True)
        wrong = [layer.name for layer, n_found in counts if n_found != layer.n_rows]
        if wrong:
            others = f" and {len(wrong) - 1} more layer(s)" if len(wrong) > 1 else ""
            skipped = sorted({name.rpartition(".")[2] for name in wrong})
            raise ValueError(
                f"{self._converter} left out, repeated or turned rows of {wrong[0]}{others}, which codes cannot "
                f"follow. Keep them dense where the float model is quantized (skip_modules={skipped}), or dequantize "
                "the whole model (peft_quantlayers.dequantize_model). Nothing was written."
            )

    def layers_in(self, place: Place) -> list[SourceLayer]:
        """The layers that have a part in ``place``."""
        return [self._layers[number] for number in place.layers.unique().tolist()]

    def kind(self, place: Place) -> Any:
        """How the layers in ``place`` are stored; raises ValueError if in several ways."""
        names = [layer.name for layer in self.layers_in(place)]
        kinds = {self._kinds[name] for name in names}
        if len(kinds) > 1:
            raise ValueError(
                f"{self._converter} joins {', '.join(names)}, which are stored as {sorted(map(str, kinds))}. Give "
                "them one width. Nothing was written."
            )
        return kinds.pop()

    def tensors(self, place: Place) -> dict[str, Tensor]:
        """The tensors of the layers in ``place``, row by row in its order."""
        found: dict[str, Tensor] = {}
        for number in place.layers.unique().tolist():
            here = place.layers == number
            for part, tensor in self._stored(self._layers[number]).items():
                if part not in found:
                    found[part] = tensor.new_empty(len(place.rows), *tensor.shape[1:])
                found[part][here] = tensor[place.rows[here]]
        return found

    def reports(self) -> list[LayerExport]:
        """Of all layers, once they have taken their places."""
        return [self._reports[layer.name] for layer in self._layers]

    def _stored(self, layer: SourceLayer) -> dict[str, Tensor]:
        """Of one layer; several tensors in a row may be parts of it."""
        if self._last is None or self._last[0] != layer.name:
            tensors, self._reports[layer.name] = self._store(layer)
            self._last = (layer.name, tensors)
        return self._last[1]
