"""What a model or a run came to, as values that print themselves. Reads models, and changes nothing."""

from .model_summary import ModelSummary, ModuleSummary, SummaryGroup
from .summarize import summary

__all__ = ["ModelSummary", "ModuleSummary", "SummaryGroup", "summary"]
