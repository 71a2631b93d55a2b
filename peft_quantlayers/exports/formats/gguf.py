"""GGUF for llama.cpp and all that is built on it: its own converter makes the file, and codes take the weights' place.

The converter gets a model whose quantized weights are stand-ins (:mod:`..gguf_converter`), so that metadata,
tokenizer, names and the order of rows are llama.cpp's own. Then the file is copied, with blocks of codes in their
place.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...formats import QuantizedWeight
from ...methods import get_method
from ..config_json import engine_config, write_config
from ..gguf_blocks import BLOCK, Bytes, affine_blocks, affine_weight, eight_bit_blocks
from ..gguf_converter import convert, converter_folder, rows_of_stand_in, stand_in
from ..grids import UniformGrid, uniform_grid
from ..shards import ShardedWriter
from ..source_layer import Matrix, SourceLayer, StackFacts, weight_of
from ..target_grid import requantized_facts
from .base import ANY_RANK, Approximation, Comparison, ExportTask, LayerFacts, Written
from .grid_format import GridFormat, GridSettings, StoredGrid

FILE = "model.gguf"
_AFFINE_BITS = 5
# What readers show as the kind of file, by the type of most weights.
_FILE_TYPES = {"Q4_1": "MOSTLY_Q4_1", "Q5_1": "MOSTLY_Q5_1", "Q8_0": "MOSTLY_Q8_0"}


class GgufFormat(GridFormat):
    """One file: HQQ up to 4 bits as Q4_1, 5 bits as Q5_1; wider ones and, with "8bit", all others as Q8_0."""

    name = "gguf"
    holds = (
        "1 to 4 bits as Q4_1 and 5 as Q5_1, exactly up to float16; 6 and 8 rounded to Q8_0; groups of multiples of 32"
    )
    engines = ("llama.cpp", "Ollama", "LM Studio", "mistral.rs", "transformers")
    approximations = ("8bit", "requantize")
    widths = (1, 2, 3, 4, 5, 6, 8)
    group_sizes = (BLOCK,)
    has_float_zeros = True
    needs_tokenizer = True
    adapter_form = "gguf"
    max_rank = ANY_RANK
    bytes_per_weight = 9.0  # the dense stand-ins, twice, and the blocks

    def check_installation(self) -> None:
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise ImportError(
                "gguf files are written with the package gguf: pip install gguf. Nothing was written."
            ) from None
        converter_folder()

    def misfit(self, facts: LayerFacts, approximate: Approximation | None) -> str:
        if facts.in_features % BLOCK:
            return f"{self.name} holds rows of blocks of {BLOCK}, and in_features={facts.in_features} is no multiple"
        if approximate is not None:
            return ""
        if not facts.is_uniform:
            reason = "groups along the outputs (axis=0)" if facts.method == "hqq" else f"{facts.method} weights"
            return f"{self.name} has no place for {reason}"
        if facts.nbits <= _AFFINE_BITS and facts.group_size % BLOCK:
            return f"{self.name} holds groups of multiples of {BLOCK}, not of {facts.group_size}"
        return ""

    def stack_misfit(self, facts: LayerFacts, stack: StackFacts, approximate: Approximation | None) -> str:
        return ""

    def model_misfit(
        self, facts: Sequence[LayerFacts], dense_linears: Collection[str], approximate: Approximation | None
    ) -> str:
        return ""

    def store(self, grid: UniformGrid, dtype: torch.dtype) -> StoredGrid:
        settings = GridSettings(nbits=grid.nbits, group_size=grid.group_size, is_symmetric=False)
        blocks = torch.from_numpy(affine_blocks(grid))
        return StoredGrid(tensors={"blocks": blocks}, weight=affine_weight(grid), settings=settings)

    def quantization_config(
        self, settings: Mapping[str, GridSettings], dense_linears: Sequence[str]
    ) -> dict[str, Any]:
        return {}  # the file says it of each tensor

    def write(self, task: ExportTask) -> Written:
        scratch = task.folder.parent / "gguf-scratch"
        try:
            self._write_stand_ins(task, scratch / "dense")
            convert(scratch / "dense", scratch / FILE, task.dtype)
            return _FileCopy(self, task).copy(scratch / FILE, task.folder / FILE)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _write_stand_ins(self, task: ExportTask, folder: Path) -> None:
        """The model in ``folder`` with a stand-in for each quantized weight, and the tokenizer."""
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
                return stand_in(rows, layer.in_features, task.dtype)

            for name, weight in layer.float_tensors(stands_for):
                writer.add(name, weight)
            first += layer.n_rows
        for name, tensor in task.source.dense_tensors(task.dtype):
            writer.add(name, tensor)
        writer.close()
        write_config(folder, engine_config(task.source.config, task.dtype))

    def block_kind(self, facts: LayerFacts) -> str:
        """The type of block of a layer of the grid that ``facts`` tells."""
        if self.misfit(facts, None) or facts.nbits > _AFFINE_BITS:
            return "Q8_0"
        return "Q4_1" if facts.nbits < _AFFINE_BITS else "Q5_1"

    def serving_command(self, folder: str, *, adapter: str | None = None) -> str:
        with_adapter = f" --lora {adapter}" if adapter else ""
        return f"llama-server -m {folder}/{FILE}{with_adapter}"


class _FileCopy:
    """A copy of the converter's file with codes in the place of stand-ins."""

    def __init__(self, export_format: GgufFormat, task: ExportTask) -> None:
        self._task = task
        self._layers = list(task.source.layers.values())
        facts = task.facts if task.requantized is None else requantized_facts(task.facts, export_format)
        self._kinds = {layer.name: export_format.block_kind(facts[layer.name]) for layer in self._layers}
        n_rows = torch.tensor([0, *(layer.n_rows for layer in self._layers)])
        self._first_rows = n_rows.cumsum(0)  # of each layer among those of all, and their number
        self._last: tuple[str, Bytes] | None = None
        self._written = Written(layers=[])
        self._rows_found = torch.zeros(len(self._layers), dtype=torch.int64)

    def copy(self, source: Path, destination: Path) -> Written:
        import gguf

        reader = gguf.GGUFReader(source)
        places = {tensor.name: self._place(tensor) for tensor in reader.tensors}
        self._check_complete()
        types = {name: None if place is None else self._block_type(place[0]) for name, place in places.items()}
        writer = gguf.GGUFWriter(destination, reader.fields["general.architecture"].contents())
        self._copy_fields(reader, writer, [each for each in types.values() if each])
        for tensor in reader.tensors:
            kind, data = types[tensor.name], tensor.data
            if kind is None:
                writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
            else:
                quantization = gguf.GGMLQuantizationType[kind]
                _, bytes_of_block = gguf.GGML_QUANT_SIZES[quantization]
                columns, *leading = (int(size) for size in tensor.shape)
                shape = (*reversed(leading), columns // BLOCK * bytes_of_block)
                writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), math.prod(shape), quantization)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            place = places[tensor.name]
            writer.write_tensor_data(tensor.data if place is None else self._data(*place))
            if place is not None and len(set(place[0].tolist())) == 1:
                self._written.row_order[tensor.name] = (self._layers[int(place[0][0])].name, place[1])
        writer.close()
        if "Q8_0" in self._kinds.values():
            self._written.notes.append("Layers without a grid of 5 bits or less were rounded to 8 bits (Q8_0).")
        return self._written

    def _place(self, tensor: Any) -> tuple[Tensor, Tensor] | None:
        """Layer and row of it of each row of a tensor, or of a stack of experts' weights one after the other."""
        import gguf

        if len(tensor.shape) not in (2, 3):
            return None
        found = []
        for data in tensor.data if len(tensor.shape) == 3 else [tensor.data]:
            values = torch.from_numpy(gguf.dequantize(data, tensor.tensor_type).astype(np.float32))
            try:
                found.append(rows_of_stand_in(values))
            except ValueError as error:
                raise ValueError(
                    f"{tensor.name}: {error}, which codes cannot follow. Dequantize the model "
                    "(peft_quantlayers.dequantize_model), and export it in 16 bits. Nothing was written."
                ) from None
        numbers = [each for each in found if each is not None]
        if len(numbers) < len(found):
            return None
        rows = torch.cat(numbers)
        layers = torch.searchsorted(self._first_rows, rows, right=True) - 1
        self._rows_found += torch.bincount(layers, minlength=len(self._layers))
        return layers, rows - self._first_rows[layers]

    def _check_complete(self) -> None:
        for layer, n_rows in zip(self._layers, self._rows_found.tolist(), strict=True):
            if n_rows != layer.n_rows:
                raise ValueError(
                    f"llama.cpp's converter left out or repeated rows of {layer.name}; its architecture cannot be "
                    "exported with codes. Dequantize the model (peft_quantlayers.dequantize_model). Nothing was "
                    "written."
                )

    def _blocks(self, layer: SourceLayer) -> Bytes:
        """Of one layer; several tensors in a row may be parts of it."""
        if self._last is None or self._last[0] != layer.name:
            kind, weight, comparison = self._kinds[layer.name], self._task.weight(layer), Comparison(self._task, layer)
            found = []
            for expert in range(layer.n_rows // layer.out_features):
                matrix = Matrix(
                    name=layer.name, expert=expert if layer.stack else None, rows=slice(0, layer.out_features)
                )
                blocks, computed = _blocks_of(weight_of(weight, matrix), kind)
                comparison.add(matrix, computed)
                found.append(blocks)
            self._last = (layer.name, np.concatenate(found) if len(found) > 1 else found[0])
            bits = 8 * self._last[1].nbytes / layer.n_weights
            report = comparison.result(stored_as=kind, bits_after=bits)
            self._written.layers = [each for each in self._written.layers if each.name != layer.name] + [report]
        return self._last[1]

    def _block_type(self, layers: Tensor) -> str:
        names = [self._layers[number].name for number in layers.unique().tolist()]
        kinds = {self._kinds[name] for name in names}
        if len(kinds) > 1:
            raise ValueError(
                f"llama.cpp joins {', '.join(names)}, which have the block types {sorted(kinds)}. Give them one width."
                " Nothing was written."
            )
        return kinds.pop()

    def _data(self, layers: Tensor, rows: Tensor) -> Bytes:
        data: Bytes | None = None
        for number in layers.unique().tolist():
            blocks = self._blocks(self._layers[number])
            if data is None:
                data = np.empty((len(rows), blocks.shape[1]), dtype=np.uint8)
            here = (layers == number).numpy()
            data[here] = blocks[rows[torch.from_numpy(here)].numpy()]
        assert data is not None
        return data

    def _copy_fields(self, reader: Any, writer: Any, kinds: list[str]) -> None:
        import gguf

        for field in reader.fields.values():
            if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
                continue
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if is_array else None)
        if kinds:
            most = max(set(kinds), key=kinds.count)
            writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[most]])
        else:
            writer.add_file_type(reader.fields["general.file_type"].contents())


def _blocks_of(weight: QuantizedWeight, kind: str) -> tuple[Bytes, Tensor]:
    """The blocks of a weight, and what readers compute from them."""
    if kind == "Q8_0":
        return eight_bit_blocks(get_method(weight.spec.method).dequantize(weight, dtype=torch.float32))
    grid = uniform_grid(weight).with_groups_of(BLOCK)
    return affine_blocks(grid), affine_weight(grid)
