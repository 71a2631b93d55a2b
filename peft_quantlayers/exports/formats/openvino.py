"""OpenVINO: its own converter traces the model, and codes take the place of the weights in the graph."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..export_source import cast
from ..side_files import has_tokenizer
from ..stand_ins import Place, StandIns
from ..traced_decoder import TracedDecoder, cache_shapes, example_inputs
from .converted import ContainerFormat, written_in_graph
from .format_base import Approximation, ExportTask, LayerFacts, Written

# The names that openvino-genai looks for.
FILE, TOKENIZER, DETOKENIZER = "openvino_model.xml", "openvino_tokenizer.xml", "openvino_detokenizer.xml"
_INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")


class OpenVinoFormat(ContainerFormat):
    """Unsigned integers of 2, 4 and 8 bits, less a zero, times a scale: what OpenVINO computes a compressed weight
    from. The cache is a state of the model, as openvino-genai has it."""

    name = "openvino"
    converter = "OpenVINO's converter"
    holds = "1 to 6 and 8 bits with float zeros in containers of 2, 4 and 8, any groups, each layer its own"
    engines = ("OpenVINO", "openvino-genai")
    approximations = ("requantize",)
    needs_tokenizer = False
    dtypes = (torch.float32, torch.float16)

    def check_installation(self) -> None:
        try:
            import openvino  # noqa: F401
        except ImportError:
            raise ImportError(
                "openvino files are written with OpenVINO: pip install openvino openvino-tokenizers. Nothing was "
                "written."
            ) from None

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if dtype in self.dtypes else torch.float16

    def misfit(self, facts: LayerFacts, approximate: Approximation | None) -> str:
        return super().misfit(dataclasses.replace(facts, is_transposed=False), approximate)

    def write_converted(self, task: ExportTask, dense: Path, scratch: Path) -> Written:
        import openvino

        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
        graph = _converted(model)
        stand_ins = self.stand_ins(task)
        _put_weights(graph, stand_ins, task.dtype)
        written = written_in_graph(task, stand_ins)
        openvino.save_model(
            graph, task.folder / FILE, compress_to_fp16=False
        )  # it leaves graphs with codes as they are
        written.notes += _write_tokenizer(task.folder)
        return written

    def serving_command(self, folder: str, *, adapter: str | None = None, rank: int = 0) -> str:
        return (
            f"python -c \"import openvino_genai as ov; pipeline = ov.LLMPipeline('{folder}', 'CPU'); "
            "print(pipeline.generate('Once upon a time', max_new_tokens=32))\""
        )


def _converted(model: Any) -> Any:
    """The graph of ``model``, with its cache as a state."""
    import openvino
    from openvino.passes import MakeStateful, Manager

    try:
        shapes = cache_shapes(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of branches that the sizes do not change
            graph = openvino.convert_model(TracedDecoder(model), example_input=example_inputs(model))
    except Exception as error:  # of the tracer, of the model, or of OpenVINO: whatever they do not know
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"OpenVINO's converter does not take this model; nothing was written. It says:\n  {said[0]}"
        ) from error
    _name_ports(graph, shapes)
    n_inputs = len(_INPUTS)
    passes = Manager()
    passes.register_pass(
        MakeStateful(list(zip(graph.get_parameters()[n_inputs:], graph.get_results()[1:], strict=True)))
    )
    passes.run_passes(graph)
    _start_empty(graph)
    return graph


def _name_ports(graph: Any, shapes: list[tuple[int, int]]) -> None:
    """Names as the engines know them, and what is known of the shapes of keys and values."""
    import openvino

    for port, name in zip(graph.inputs, _INPUTS, strict=False):
        port.set_names({name})
    graph.outputs[0].set_names({"logits"})
    for index, (heads, size) in enumerate(shapes):
        name = f"{index // 2}.{('key', 'value')[index % 2]}"
        past = graph.inputs[len(_INPUTS) + index]
        past.set_names({f"past_key_values.{name}"})
        past.node.set_partial_shape(openvino.PartialShape([-1, heads, -1, size]))
        graph.outputs[1 + index].set_names({f"present.{name}"})
    graph.validate_nodes_and_infer_types()


def _start_empty(graph: Any) -> None:
    """The state before the first token: no keys and values, for as many rows as there are in ``input_ids``."""
    import openvino.opset13 as ops

    n_rows = ops.gather(ops.shape_of(graph.input("input_ids")), ops.constant([0]), ops.constant(0))
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, size = node.get_output_partial_shape(0)
            sizes = [ops.constant([each]) for each in (heads.get_length(), 0, size.get_length())]
            shape = ops.concat([n_rows, *sizes], axis=0)
            node.set_arguments([ops.broadcast(ops.constant(np.float32(0)), shape)])
    graph.validate_nodes_and_infer_types()


def _put_weights(graph: Any, stand_ins: StandIns, dtype: torch.dtype) -> None:
    """Put the codes of its layers in the place of each stand-in, and other weights into ``dtype``."""
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "Constant" or len(node.get_output_shape(0)) != 2:
            continue
        name, values = node.get_friendly_name(), torch.from_numpy(np.array(node.data))
        is_weight = values.is_floating_point()
        place = stand_ins.place(name, [values], may_be_transposed=True) if is_weight else None
        if place is not None:
            weight = _weight(place, stand_ins)
        elif values.dtype == torch.float32 != dtype:
            weight = _constant(cast(values, dtype, name))
        else:
            continue
        weight.set_friendly_name(name)
        for consumer in node.output(0).get_target_inputs():
            consumer.replace_source_output(weight.output(0))


def _weight(place: Place, stand_ins: StandIns) -> Any:
    import openvino
    import openvino.opset13 as ops

    nbits, group_size = stand_ins.kind(place)
    parts = stand_ins.tensors(place)
    n_rows, n_groups = parts["scale"].shape
    packed = openvino.Tensor(
        parts["codes"].numpy(), openvino.Shape([n_rows, n_groups, group_size]), getattr(openvino.Type, f"u{nbits}")
    )
    codes = openvino.op.Constant(packed, shared_memory=False)  # torch frees what it shares
    scale, zero = (_constant(parts[part].unsqueeze(-1)) for part in ("scale", "zero"))
    groups = ops.multiply(ops.subtract(ops.convert(codes, "f32"), zero), scale)
    weight = ops.reshape(groups, ops.constant([n_rows, n_groups * group_size]), special_zero=False)
    return ops.transpose(weight, ops.constant([1, 0])) if place.is_transposed else weight


def _constant(values: Tensor) -> Any:
    """``values`` as they are stored, in float32 for what computes with them."""
    import openvino
    import openvino.opset13 as ops

    stored = openvino.op.Constant(values.numpy(), shared_memory=False)
    return stored if values.dtype == torch.float32 else ops.convert(stored, "f32")


def _write_tokenizer(folder: Path) -> list[str]:
    """Beside the tokenizer's files, the model into which openvino-genai wants it; or a note why it is not there."""
    if not has_tokenizer(folder):
        return ["openvino-genai needs a tokenizer, and the model's folder has none: pass tokenizer=."]
    try:
        from openvino_tokenizers import convert_tokenizer
    except ImportError:
        return ["openvino-genai needs the tokenizer as a model: pip install openvino-tokenizers, and export again."]
    import openvino

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for model, name in zip(convert_tokenizer(tokenizer, with_detokenizer=True), (TOKENIZER, DETOKENIZER), strict=True):
        openvino.save_model(model, folder / name)
    return []
