"""All export formats by name."""

from .base import ExportFormat
from .dense import DenseFormat
from .gguf import GgufFormat
from .gptq_awq import AwqFormat, GptqFormat
from .mlx import MlxFormat
from .onnx import OnnxFormat
from .openvino import OpenVinoFormat
from .published import AqlmFormat, HqqFormat
from .vllm import CompressedTensorsFormat, HummingFormat

_FORMATS: tuple[ExportFormat, ...] = (
    GgufFormat(),
    MlxFormat(),
    HummingFormat(),
    CompressedTensorsFormat(),
    OnnxFormat(),
    OpenVinoFormat(),
    AwqFormat(),
    GptqFormat(),
    HqqFormat(),
    AqlmFormat(),
    DenseFormat(),
)


def export_formats() -> dict[str, ExportFormat]:
    """The formats that :func:`peft_quantlayers.export` writes, by name; each prints what it holds and for whom."""
    return {each.name: each for each in _FORMATS}
