"""Other programs' converters make the graph or the file; the codes of quantized layers get into it by stand-ins.

A converter moves, splits, joins and transposes weights, each architecture's otherwise. So it is given a dense model in
which the weight of a quantized layer is a stand-in, whose rows say which ones they are. What it made of them tells
where each row belongs, and there codes take its place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config_json import engine_config, write_config
from .formats.base import ExportTask
from .report import LayerExport
from .shards import ShardedWriter

# A stand-in says in each row which layer and row it is, in digits to this base, which every dtype holds.
_BASE = 128
# Columns after which the digits are repeated, each with its own meaning.
_PERIOD = 8
_MARK = 127.0


def stand_in(layer: int, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """A weight (out_features, in_features) whose rows say which ones they are."""
    rows, columns = torch.arange(out_features), torch.arange(in_features)
    by_row: list[Tensor | int] = [layer % _BASE, layer // _BASE, rows % _BASE, rows // _BASE % _BASE, rows // _BASE**2]
    by_column = [columns // _PERIOD % _BASE, columns // (_PERIOD * _BASE)]
    weight = torch.empty(out_features, in_features, dtype=dtype)
    for place, digit in enumerate(by_row):
        weight[:, place::_PERIOD] = digit.to(dtype).unsqueeze(1) if isinstance(digit, Tensor) else digit
    for place, digits in enumerate(by_column, start=len(by_row)):
        weight[:, place::_PERIOD] = digits[place::_PERIOD].to(dtype)
    weight[:, _PERIOD - 1 :: _PERIOD] = _MARK
    return weight


def rows_of_stand_in(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Layer and row, int64, of each row of ``weight``, floating; None if it is no :func:`stand_in`.

    Raises:
        ValueError: it is one, but its numbers or columns were changed.
    """
    if weight.dim() != 2 or weight.shape[1] < _PERIOD or not (weight[:, _PERIOD - 1] == _MARK).all():
        return None
    digits = weight[:, :5].long()
    layers, rows = digits[:, 0] + _BASE * digits[:, 1], digits[:, 2] + _BASE * digits[:, 3] + _BASE**2 * digits[:, 4]
    columns = torch.arange(weight.shape[1])
    for place, each in enumerate([*digits.unbind(1), columns // _PERIOD % _BASE, columns // (_PERIOD * _BASE)]):
        expected = each.unsqueeze(1) if place < 5 else each[place::_PERIOD]
        if not (weight[:, place::_PERIOD] == expected).all():
            raise ValueError("the converter changes the weights or the order of their inputs")
    return layers, rows


def write_stand_ins(task: ExportTask, folder: Path, dtype: torch.dtype) -> None:
    """The model of ``task`` in ``folder``, dense, with a stand-in for each quantized weight, and its tokenizer."""
    folder.mkdir(parents=True)
    for file in task.folder.iterdir():  # tokenizer and generation config
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    writer = ShardedWriter(folder)
    for number, (name, layer) in enumerate(task.source.layers.items()):
        weight = stand_in(number, layer.out_features, layer.in_features, dtype)
        writer.add(f"{name}.weight", weight.t() if layer.is_transposed else weight)
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

    @property
    def numbers(self) -> list[int]:
        """The layers that have a part in it."""
        return sorted(set(self.layers.tolist()))


class StandIns:
    """Finds the stand-ins of a model in what a converter made, and gives what takes their places.

    Attributes:
        names: of the layers, by number.
        reports: of each layer that took its place, by name.
    """

    def __init__(
        self,
        task: ExportTask,
        converter: str,
        kinds: Mapping[str, Any],
        store: Callable[[str], tuple[dict[str, Tensor], LayerExport]],
    ) -> None:
        """
        Args:
            task: whose layers they are, in the order of :func:`write_stand_ins`.
            converter: its name, for messages.
            kinds: how each layer is stored; those in one tensor must be of one kind.
            store: gives the tensors of a layer, with out_features as their first axis, and its report.
        """
        self._layers = task.source.layers
        self.names = list(self._layers)
        self.reports: dict[str, LayerExport] = {}
        self._converter = converter
        self._kinds = kinds
        self._store = store
        self._last: tuple[str, dict[str, Tensor]] | None = None
        self._n_found = torch.zeros(len(self.names), dtype=torch.int64)

    def place(self, tensor_name: str, values: Tensor) -> Place | None:
        """Where the rows of ``values``, floating, are from; None if it is no stand-in.

        Raises:
            ValueError: the converter has changed the weights, not only moved them.
        """
        if values.dim() != 2:
            return None
        try:
            found = rows_of_stand_in(values)
            is_transposed = found is None
            found = rows_of_stand_in(values.t()) if found is None else found
        except ValueError as error:
            raise ValueError(
                f"{tensor_name}: {error}, which codes cannot follow. Dequantize the model "
                "(peft_quantlayers.dequantize_model), and export it in 16 bits. Nothing was written."
            ) from None
        if found is None:
            return None
        self._n_found += torch.bincount(found[0], minlength=len(self.names))
        return Place(layers=found[0], rows=found[1], is_transposed=is_transposed)

    def check_complete(self) -> None:
        """Raise ValueError unless every row of every layer has one place."""
        found = zip(self.names, self._n_found.tolist(), strict=True)
        wrong = [name for name, n_rows in found if n_rows != self._layers[name].out_features]
        if wrong:
            raise ValueError(
                f"{self._converter} left out or repeated rows of {wrong[0]}; its architecture cannot be exported with "
                "codes. Dequantize the model (peft_quantlayers.dequantize_model). Nothing was written."
            )

    def kind(self, place: Place) -> Any:
        """How the layers in ``place`` are stored; raises ValueError if in several ways."""
        names = [self.names[number] for number in place.numbers]
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
        for number in place.numbers:
            here = place.layers == number
            for part, tensor in self._stored(self.names[number]).items():
                if part not in found:
                    found[part] = tensor.new_empty(len(place.rows), *tensor.shape[1:])
                found[part][here] = tensor[place.rows[here]]
        return found

    def _stored(self, name: str) -> dict[str, Tensor]:
        """Of one layer; several tensors in a row may be parts of it."""
        if self._last is None or self._last[0] != name:
            tensors, self.reports[name] = self._store(name)
            self._last = (name, tensors)
        return self._last[1]
