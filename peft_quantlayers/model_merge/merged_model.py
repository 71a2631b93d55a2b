"""What ``merge_back`` returns: a pair that also says what it is where it is taken for the model."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

from torch import nn

from ..merging import MergeReport


class MergedModel(NamedTuple):
    """The merged model and the report on the merge; unpacks as ``model, report``.

    Fields:
        model: the base model, merged; the PEFT model with ``unload=False``.
        report: what the merge did to each layer.
    """

    model: nn.Module
    report: MergeReport

    def __getattr__(self, name: str) -> NoReturn:
        hint = f"; for the model's write .model.{name}" if hasattr(self.model, name) else ""
        raise AttributeError(
            f"merge_back returned the pair (model, report), which has no {name!r}{hint}. Write "
            "model, report = merge_back(...), or take .model and .report of the pair."
        )

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Say where the model is: the pair is none."""
        raise TypeError(
            "merge_back returned the pair (model, report), and only the model can be called: write .model(...), or "
            "model, report = merge_back(...)."
        )

    def __repr__(self) -> str:
        return f"MergedModel(model={type(self.model).__name__}, report={len(self.report.layers)} merged layers)"
