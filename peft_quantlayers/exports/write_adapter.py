"""Chooses the form in which the adapter beside an exported model is written."""

from __future__ import annotations

from .adapters import Adapter
from .engine_adapters import n_layers_of, write_gguf_adapter, write_mlx_adapter, write_peft_adapter
from .formats.format_base import AdapterForm, ExportTask, Written
from .formats.gguf import FILE

ADAPTER = "adapter"


def write_adapter(form: AdapterForm, adapter: Adapter, task: ExportTask, written: Written) -> str:
    """Write ``adapter`` below the task's folder; its name there."""
    if form == "gguf":
        write_gguf_adapter(adapter, task.folder / f"{ADAPTER}.gguf", task.folder / FILE, written.row_order)
        return f"{ADAPTER}.gguf"
    if form == "mlx":
        n_layers = n_layers_of(task.source.config)
        write_mlx_adapter(adapter, task.folder / ADAPTER, task.dtype, n_layers=n_layers)
    else:
        write_peft_adapter(adapter, task.folder / ADAPTER, task.dtype)
    return ADAPTER
