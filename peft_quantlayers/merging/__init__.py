"""Merging a delta into a quantized weight: plan, rules, report, and the state that takes it back. Knows no PEFT."""

from .layer_report import LayerMergeReport
from .merge_report import MergeReport
from .merge_source import MergeSource
from .merge_state import LayerWrite, MergeState, Snapshot
from .planned_merge import AdapterTraits, MergePlan, MergeResult, MergeRule

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
