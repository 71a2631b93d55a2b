"""Quantized models in the files that inference engines read. Reads models and folders, and changes neither."""

from .export import export
from .export_report import ExportReport, LayerExport
from .formats.format_base import ExportFormat
from .formats.format_registry import export_formats

__all__ = ["ExportFormat", "ExportReport", "LayerExport", "export", "export_formats"]
