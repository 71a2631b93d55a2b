"""GGUF for llama.cpp and all that is built on it: its own converter makes the file, and codes take the weights' place.

The converter gets a model whose quantized weights are stand-ins (:mod:`..stand_ins`), so that metadata,
tokenizer, names and the order of rows are llama.cpp's own. Then the file is copied, with blocks of codes in their
place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...formats import QuantizedWeight
from ...methods import get_method
from ..export_report import LayerExport
from ..gguf_blocks import BLOCK, Bytes, affine_blocks, affine_weight, eight_bit_blocks
from ..gguf_converter import convert, converter_folder
from ..source_layer import Matrix, SourceLayer, StackFacts, weight_of
from ..stand_ins import Place, StandIns
from ..uniform_grid import UniformGrid, uniform_grid
from .converted import ConvertedFormat
from .format_base import ANY_RANK, Approximation, Comparison, ExportTask, LayerFacts, Written
from .grid_format import GridSettings, StoredGrid

FILE = "model.gguf"
_AFFINE_BITS = 5
# What readers show as the kind of file, by the type of most weights.
_FILE_TYPES = {"Q4_1": "MOSTLY_Q4_1", "Q5_1": "MOSTLY_Q5_1", "Q8_0": "MOSTLY_Q8_0"}


# What llama.cpp does for a family, whatever the config says: whether the weights of a token's experts are scaled to a
# sum of 1, and the activation of gated layers. Read off its graphs, and tried.
_SCALES_EXPERTS = {"qwen3_moe": True, "qwen2_moe": False, "olmoe": False}
_SILU = ("silu", "swish")
_WITH_SILU = {
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen2_moe",
    "qwen3_moe",
    "olmo2",
    "olmoe",
    "phi3",
    "granite",
}


class GgufFormat(ConvertedFormat):
    """One file: HQQ up to 4 bits as Q4_1, 5 bits as Q5_1; wider ones and, with "8bit", all others as Q8_0."""

    name = "gguf"
    converter = "llama.cpp's converter"
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

    def config_misfit(self, config: Mapping[str, Any]) -> str:
        family = config.get("model_type", "")
        scales = _SCALES_EXPERTS.get(family)
        if scales is not None and bool(config.get("norm_topk_prob", False)) != scales:
            does = "scales" if scales else "does not scale"
            return (
                f"llama.cpp {does} the weights of a token's experts in {family} to a sum of 1, and this model has "
                f"norm_topk_prob={not scales}"
            )
        if family in _WITH_SILU and (activation := config.get("hidden_act", "silu")) not in _SILU:
            return f"llama.cpp computes {family} with silu, and this model has hidden_act={activation!r}"
        return ""

    def store(self, grid: UniformGrid, dtype: torch.dtype) -> StoredGrid:
        settings = GridSettings(nbits=grid.nbits, group_size=grid.group_size, is_symmetric=False)
        blocks = torch.from_numpy(affine_blocks(grid))
        return StoredGrid(tensors={"blocks": blocks}, weight=affine_weight(grid), settings=settings)

    def write_converted(self, task: ExportTask, dense: Path, scratch: Path) -> Written:
        convert(dense, scratch / FILE, task.dtype)
        return _FileCopy(self, task).copy(scratch / FILE, task.folder / FILE)

    def block_kind(self, facts: LayerFacts) -> str:
        """The type of block of a layer of the grid that ``facts`` tells."""
        if self.misfit(facts, None) or facts.nbits > _AFFINE_BITS:
            return "Q8_0"
        return "Q4_1" if facts.nbits < _AFFINE_BITS else "Q5_1"

    def serving_command(self, folder: str, *, adapter: str | None = None, rank: int = 0) -> str:
        with_adapter = f" --lora {adapter}" if adapter else ""
        return f"llama-server -m {folder}/{FILE}{with_adapter}"


class _FileCopy:
    """A copy of the converter's file with codes in the place of stand-ins."""

    def __init__(self, export_format: GgufFormat, task: ExportTask) -> None:
        self._task = task
        facts = export_format.facts_to_write(task)
        self._kinds = {name: export_format.block_kind(facts[name]) for name in task.source.layers}
        self._stand_ins = StandIns(task, export_format.converter, self._kinds, self._blocks)

    def copy(self, source: Path, destination: Path) -> Written:
        import gguf

        reader = gguf.GGUFReader(source)
        places = {tensor.name: self._place(tensor) for tensor in reader.tensors}
        self._stand_ins.check_complete()
        types = {name: None if place is None else self._stand_ins.kind(place) for name, place in places.items()}
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
        row_order = {}
        for tensor in reader.tensors:
            place = places[tensor.name]
            if place is None:
                writer.write_tensor_data(tensor.data)
                continue
            writer.write_tensor_data(self._stand_ins.tensors(place)["blocks"].numpy())
            if len(layers := self._stand_ins.layers_in(place)) == 1:
                row_order[tensor.name] = (layers[0].name, place.rows)
        writer.close()
        written = Written(layers=self._stand_ins.reports(), row_order=row_order)
        if "Q8_0" in self._kinds.values():
            written.notes.append("Layers without a grid of 5 bits or less were rounded to 8 bits (Q8_0).")
        return written

    def _place(self, tensor: Any) -> Place | None:
        """Of a weight, or of a stack of experts' weights one after the other."""
        import gguf

        if len(tensor.shape) not in (2, 3):
            return None
        parts = tensor.data if len(tensor.shape) == 3 else [tensor.data]
        values = (torch.from_numpy(gguf.dequantize(part, tensor.tensor_type).astype(np.float32)) for part in parts)
        return self._stand_ins.place(tensor.name, values)

    def _blocks(self, layer: SourceLayer) -> tuple[dict[str, Tensor], LayerExport]:
        """Of one layer, and its report."""
        kind, weight, comparison = self._kinds[layer.name], self._task.weight(layer), Comparison(self._task, layer)
        found = []
        for expert in range(layer.n_rows // layer.out_features):
            matrix = Matrix(name=layer.name, expert=expert if layer.stack else None, rows=slice(0, layer.out_features))
            blocks, computed = _blocks_of(weight_of(weight, matrix), kind)
            comparison.add(matrix, computed)
            found.append(torch.from_numpy(blocks))
        stored = torch.cat(found) if len(found) > 1 else found[0]
        return {"blocks": stored}, comparison.result(stored_as=kind, bits_after=8 * stored.nbytes / layer.n_weights)

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
