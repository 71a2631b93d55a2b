"""How much of the adapters' effect a merge retains: predictions and outputs of base, adapter and merged model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from peft import PeftModel
from torch import Tensor

from ..calibration.data import max_length
from ..evaluate import Capture, capture
from ..merging import Snapshot
from .active_adapters import only_active
from .output_retention import OutputRetention, watched
from .targets import MergeTarget

# Tokens that are scored at a time: three windows of logits are kept.
WINDOW = 256


def measured_effect(
    peft_model: PeftModel, targets: Sequence[MergeTarget], names: list[str], token_ids: Tensor
) -> Capture:
    """Compare the predictions of base, adapter and merged model by switching the layers between these states.

    The layers' outputs are compared in the same passes, and written into their reports. The model ends merged, as it
    was.

    Args:
        peft_model: merged.
        targets: its merged layers.
        names: of the adapters.
        token_ids: held-out text, (n_tokens,), integer.
    """
    merged = [target.source.snapshot() for target in targets]
    unmerged = [snapshot.unmerged or snapshot for snapshot in merged]
    retentions = [OutputRetention() for _ in targets]

    def logits(ids: Tensor) -> Tensor:
        return peft_model(input_ids=ids, use_cache=False).logits

    def of_adapter(ids: Tensor) -> Tensor:
        with _in_state(targets, unmerged, back_to=merged), watched(zip(targets, merged, retentions, strict=True)):
            return logits(ids)

    def of_base(ids: Tensor) -> Tensor:
        with _in_state(targets, unmerged, back_to=merged), peft_model.disable_adapter():
            return logits(ids)

    was_training = peft_model.training
    peft_model.eval()
    try:
        with only_active(peft_model, targets, names):
            window = min(WINDOW, len(token_ids), max_length(peft_model))
            captured = capture(of_adapter, of_base, logits, token_ids.to(peft_model.device), window=window)
    finally:
        peft_model.train(was_training)
    for target, retention in zip(targets, retentions, strict=True):
        state = target.source.merging
        if state.report is not None:
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
