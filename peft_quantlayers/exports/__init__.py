"""Quantized models in the files that inference engines read. Reads models and folders, and changes neither."""

from .export import export
from .formats.base import ExportFormat
from .formats.registry import export_formats
from .report import ExportReport, LayerExport

__all__ = ["ExportFormat", "ExportReport", "LayerExport", "export", "export_formats"]
