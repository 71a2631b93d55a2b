"""Rules of merging: a delta and a quantized weight in, a quantized weight out; their plan and report. No PEFT."""

from .report import LayerMergeReport, MergeReport

__all__ = ["LayerMergeReport", "MergeReport"]
