"""How much of the adapters' effect a merge retains: predictions and outputs of base, adapter and merged model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from ..evaluate import Capture
from ..evaluate.capture import compare_predictions
from ..merging import Snapshot
from .held_out_calls import HeldOutBatch
from .merge_targets import MergeTarget
from .output_retention import OutputRetention, watched
from .prepared_merge import PreparedMerge


def measured_effect(merge: PreparedMerge) -> Capture | None:
    """Compare the predictions of base, adapter and merged model by switching the layers between these states.

    The layers' outputs are compared in the same passes, and written into their reports. The model, which is merged,
    ends as it was. None, and nothing is done, without held-out data.
    """
    if merge.held_out is None:
        return None
    peft_model, targets, base_model = merge.peft_model, merge.targets, merge.base_model
    merged = [target.source.snapshot() for target in targets]
    unmerged = [snapshot.unmerged or snapshot for snapshot in merged]
    retentions = [OutputRetention() for _ in targets]

    def of_merged(batch: HeldOutBatch) -> Tensor:
        return batch.logits(base_model)

    def of_adapter(batch: HeldOutBatch) -> Tensor:
        with _in_state(targets, unmerged, back_to=merged), watched(zip(targets, merged, retentions, strict=True)):
            return of_merged(batch)

    def of_base(batch: HeldOutBatch) -> Tensor:
        with _in_state(targets, unmerged, back_to=merged), peft_model.disable_adapter():
            return of_merged(batch)

    was_training = peft_model.training
    peft_model.eval()
    try:
        with merge.only_its_adapters():
            scored = [(batch, batch.targets) for batch in merge.held_out]
            captured = compare_predictions(of_adapter, of_base, of_merged, scored, progress=merge.progress)
    finally:
        peft_model.train(was_training)
    for target, retention in zip(targets, retentions, strict=True):
        state = target.source.merging
        if state.report is not None and retention.is_measured:
            state.report = replace(state.report, output_retained=retention.retained, output_noise=retention.noise)
    return captured


@contextmanager
def _in_state(
    targets: Sequence[MergeTarget], snapshots: Sequence[Snapshot], *, back_to: Sequence[Snapshot]
) -> Iterator[None]:
    restore(targets, snapshots)
    try:
        yield
    finally:
        restore(targets, back_to)


def restore(targets: Sequence[MergeTarget], snapshots: Sequence[Snapshot]) -> None:
    """Restore every layer to its snapshot."""
    for target, snapshot in zip(targets, snapshots, strict=True):
        target.source.restore(snapshot)
