"""All export formats by name."""

from ...arguments import nearest
from ...methods.hqq.export_grids import ALIASES
from .dense import DenseFormat
from .format_base import ExportFormat
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


def format_named(name: str) -> ExportFormat:
    """The format ``name``.

    Raises:
        ValueError: there is none; names what is spelled nearly so or, for the name of an engine, what that reads.
    """
    formats = export_formats()
    if isinstance(name, str) and name in formats:
        return formats[name]
    read = _read_by(name) if isinstance(name, str) else []
    hint = f": {name} is an engine, which reads {' and '.join(map(repr, read))}" if read else nearest(name, formats)
    raise ValueError(f"format={name!r} is not supported{hint}; choose one of {tuple(formats)}. Nothing was written.")


def _read_by(engine: str) -> list[str]:
    """The formats that ``engine`` reads, however it is spelled."""

    def spelled(text: str) -> str:
        return text.partition(" (")[0].lower().replace("_", "-").replace(" ", "-")

    found = [each.name for each in _FORMATS if spelled(engine) in map(spelled, each.engines)]
    alias = ALIASES.get(spelled(engine))
    return found or ([alias] if alias else [])
