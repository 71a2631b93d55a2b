"""Merging a delta into a quantized weight: plan, rules, report, and the state that takes it back. Knows no PEFT."""

from .layer_report import LayerMergeReport
from .plan import AdapterTraits, MergePlan, MergeResult, MergeRule
from .report import MergeReport
from .source import MergeSource
from .state import MergeState, Snapshot

__all__ = [
    "AdapterTraits",
    "LayerMergeReport",
    "MergePlan",
    "MergeReport",
    "MergeResult",
    "MergeRule",
    "MergeSource",
    "MergeState",
    "Snapshot",
]
