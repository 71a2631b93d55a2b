"""ONNX for ONNX Runtime: onnxruntime-genai's builder makes the graph, and codes take the place of its weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ..own_process import convert_with
from ..stand_ins import Place, StandIns
from .converted import ContainerFormat, written_in_graph
from .format_base import ExportTask, Written

FILE = "model.onnx"
_BUILDER = "onnxruntime_genai.models.builder"
# Of the operators of ONNX Runtime's own, where MatMulNBits is.
_DOMAIN = "com.microsoft"
# Zeros of wider codes must be codes.
_MAX_FLOAT_ZERO_BITS = 4


class OnnxFormat(ContainerFormat):
    """``MatMulNBits`` in the place of ``MatMul``: blocks of codes, scales and zeros of (out_features, n_blocks).

    Without an ``accuracy_level``, so that activations are not rounded. Source: ONNX Runtime's ContribOperators.md.
    """

    name = "onnx"
    converter = "onnxruntime-genai's builder"
    holds = "1 to 4 bits with float zeros and 5, 6, 8 with integer zeros, groups of 16 to 256 and multiples of these"
    engines = ("ONNX Runtime", "onnxruntime-genai")
    approximations = ("8bit", "requantize")
    group_sizes = (16, 32, 64, 128, 256)
    dtypes = (torch.float32,)  # in which ONNX Runtime computes on CPUs

    def check_installation(self) -> None:
        try:
            import onnx_ir  # noqa: F401
            import onnxruntime_genai  # noqa: F401
        except ImportError:
            raise ImportError(
                "onnx files are made with onnxruntime-genai's builder: pip install onnxruntime-genai onnx onnx-ir. "
                "Nothing was written."
            ) from None

    def holds_float_zeros(self, nbits: int) -> bool:
        return nbits <= _MAX_FLOAT_ZERO_BITS

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def write_converted(self, task: ExportTask, dense: Path, scratch: Path) -> Written:
        import onnx_ir

        built = scratch / "built"
        options = ["-i", str(dense), "-o", str(built), "-c", str(scratch / "cache"), "-p", "fp32", "-e", "cpu"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        convert_with(self.converter, ["-m", _BUILDER, *options], environment, built / FILE)
        model = onnx_ir.load(built / FILE)
        stand_ins = self.stand_ins(task)
        _put_codes(model.graph, stand_ins)
        model.opset_imports.setdefault(_DOMAIN, 1)
        onnx_ir.save(model, task.folder / FILE, external_data=f"{FILE}.data")
        for file in built.iterdir():  # the engine's config, and the tokenizer as it reads it
            if file.is_file() and not file.name.startswith(FILE):
                shutil.copyfile(file, task.folder / file.name)
        return written_in_graph(task, stand_ins)

    def serving_command(self, folder: str, *, adapter: str | None = None, rank: int = 0) -> str:
        return (
            f"python -c \"import onnxruntime_genai as og; m = og.Model('{folder}'); t = og.Tokenizer(m); "
            "g = og.Generator(m, og.GeneratorParams(m)); g.append_tokens(t.encode('Once upon a time')); "
            '[g.generate_next_token() for _ in range(32)]; print(t.decode(g.get_sequence(0)))"'
        )


def _put_codes(graph: Any, stand_ins: StandIns) -> None:
    """Replace each product with a stand-in by one with the codes of its layers."""
    import onnx_ir

    for node in list(graph):
        if node.op_type != "MatMul" or node.inputs[1].const_value is None:
            continue
        weight = node.inputs[1]  # (in_features, out_features)
        place = stand_ins.place(weight.name, [torch.tensor(weight.const_value.numpy()).t()])
        if place is None:
            continue
        new = _product(node, place, stand_ins)
        onnx_ir.convenience.replace_nodes_and_values(graph, node, [node], [new], node.outputs, new.outputs)
        del graph.initializers[weight.name]


def _product(node: Any, place: Place, stand_ins: StandIns) -> Any:
    import onnx_ir

    nbits, block_size = stand_ins.kind(place)
    parts = stand_ins.tensors(place)
    out_features, n_blocks = parts["scale"].shape
    shapes = {
        "codes": (out_features, n_blocks, -1),
        "scale": (out_features, n_blocks),
        "zero": (out_features, n_blocks),
    }
    name = node.inputs[1].name
    inputs = [
        onnx_ir.val(
            f"{name}.{part}", const_value=onnx_ir.tensor(parts[part].view(shape).numpy(), name=f"{name}.{part}")
        )
        for part, shape in shapes.items()
    ]
    for each in inputs:
        node.graph.register_initializer(each)
    attributes = {"K": n_blocks * block_size, "N": out_features, "bits": nbits, "block_size": block_size}
    return onnx_ir.node("MatMulNBits", [node.inputs[0], *inputs], attributes, domain=_DOMAIN, name=node.name)
