"""The end of the demo: the merged model as an engine reads it, and a line of text that llama.cpp writes with it."""

from __future__ import annotations

import logging
from pathlib import Path

from llama_cpp_converter import ensure_converter

import peft_quantlayers as pql


def export_and_generate(merged: Path, destination: Path, format: str, prompt: str) -> dict[str, object]:
    """Export the folder ``merged``; with "gguf", llama.cpp goes on from ``prompt``. For the demo's result.

    Raises:
        ImportError: no llama.cpp for Python is installed; has the pip line.
    """
    if format == "gguf":
        ensure_converter()
    report = pql.export(merged, destination, format, overwrite=True)
    print(report)
    result: dict[str, object] = {
        "format": format,
        "is_exact": report.is_exact,
        "bits": report.bits[1],
        "size_mb": report.n_bytes / 1e6,
        "serving_command": report.serving_command,
    }
    if format == "gguf":
        result["written"] = text_from_llama_cpp(destination / "model.gguf", prompt)
        print(f"llama.cpp wrote: {result['written']!r}")
    return result


def text_from_llama_cpp(file: Path, prompt: str, *, n_tokens: int = 48) -> str:
    """What llama.cpp writes after ``prompt``, greedily."""
    try:
        import xllamacpp
    except ImportError:
        raise ImportError("llama.cpp is not installed: pip install xllamacpp") from None
    logging.getLogger("xllamacpp").setLevel(logging.ERROR)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = 1024
    server = xllamacpp.Server(parameters)
    answer = server.handle_completions({"prompt": prompt, "max_tokens": n_tokens, "temperature": 0})
    return answer["choices"][0]["text"].strip()
