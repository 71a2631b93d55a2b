"""Which adapters are active while a model is merged and measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from peft import PeftModel

from .merge_targets import MergeTarget


@contextmanager
def only_active(peft_model: PeftModel, targets: Sequence[MergeTarget], names: list[str]) -> Iterator[None]:
    """Exactly these adapters are active; the active and trainable ones are restored. What is merged stays merged."""
    active = list(peft_model.active_adapters)
    trained = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    set_active(peft_model, targets, names)
    try:
        yield
    finally:
        set_active(peft_model, targets, active)
        for name, parameter in peft_model.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad = name in trained


def set_active(peft_model: PeftModel, targets: Sequence[MergeTarget], names: list[str]) -> None:
    """PEFT's ``set_adapter``, but merged ``targets`` stay merged: PEFT's own unmerges every merged layer."""
    merged = [list(target.module.merged_adapters) for target in targets]
    for target in targets:
        target.module.merged_adapters.clear()
    try:
        cast(Any, peft_model.base_model).set_adapter(names)
    finally:
        for target, adapters in zip(targets, merged, strict=True):
            target.module.merged_adapters[:] = adapters
