"""How much of the adapters' effect a merge retains: predictions and outputs of base, adapter and merged model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from peft import PeftModel
from torch import Tensor

from ..evaluate import Capture
from ..evaluate.capture import compare_predictions
from ..merging import Snapshot
from .active_adapters import only_active
from .held_out_calls import HeldOutBatch
from .output_retention import OutputRetention, watched
from .targets import MergeTarget


def measured_effect(
    peft_model: PeftModel,
    targets: Sequence[MergeTarget],
    names: list[str],
    batches: Sequence[HeldOutBatch],
    *,
    progress: bool = False,
) -> Capture:
    """Compare the predictions of base, adapter and merged model by switching the layers between these states.

    The layers' outputs are compared in the same passes, and written into their reports. The model ends merged, as it
    was.

    Args:
        peft_model: merged.
        targets: its merged layers.
        names: of the adapters.
        batches: held-out data.
        progress: show a progress bar.
    """
    merged = [target.source.snapshot() for target in targets]
    unmerged = [snapshot.unmerged or snapshot for snapshot in merged]
    retentions = [OutputRetention() for _ in targets]
    base_model = peft_model.get_base_model()

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
        with only_active(peft_model, targets, names):
            scored = [(batch, batch.targets) for batch in batches]
            captured = compare_predictions(of_adapter, of_base, of_merged, scored, progress=progress)
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
