"""Merging a delta into a quantized weight: plan, rules, report, and the state that takes it back. Knows no PEFT."""

from .layer_report import LayerMergeReport
from .merge_report import MergeReport
from .merge_source import MergeSource
from .planned_merge import AdapterTraits, MergePlan, MergeResult, MergeRule
from .state import LayerWrite, MergeState, Snapshot

__all__ = [
    "AdapterTraits",
    "LayerMergeReport",
    "LayerWrite",
    "MergePlan",
    "MergeReport",
    "MergeResult",
    "MergeRule",
    "MergeSource",
    "MergeState",
    "Snapshot",
]
