"""LoRA on a quantized embedding table: PEFT's layer, whose merges are undone to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from peft.tuners.lora.layer import Embedding
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..layers import QuantizedEmbedding
from ..merging import MergePlan, MergeSource, MergeState
from .dense_stand_in import plan_by_peft


class LoraQuantizedEmbedding(Embedding, MergeSource):
    """LoRA beside the lookup in a :class:`QuantizedEmbedding`. Merging quantizes the rows that a delta changes.

    Attributes:
        merging: what is merged into the table, and the way back.
    """

    kind = "table"
    knows_unmerged_weight = True
    measures_outputs = False  # its inputs are indices

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.merging = MergeState(tensor_names=())
        super().__init__(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the given adapters, None for the active ones, together with those merged before.

        Raises:
            ValueError: the merged table is not finite; names the layer, which is left as it was.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_embedding_A]
        if not new:
            return
        if self.is_written_by_others or not self.is_mergeable:  # or dequantized under its adapters
            return super().merge(safe_merge=safe_merge, adapter_names=new)
        self.merge_by(self.rule_of("auto"), [*self.merged_adapters, *new])

    def unmerge(self) -> None:
        """Restore the codes from before the merge; by subtraction where the table was written since."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
        elif self.merging.unmerged is None or self.is_written_by_others:
            self.forget_merge()
            super().unmerge()
        else:
            self.undo_merge()

    @property
    def is_mergeable(self) -> bool:
        return isinstance(self.quantized_base(), QuantizedEmbedding)

    def plan(self, names: Sequence[str], part: int = 0) -> MergePlan:
        ordered = [name for name in self.lora_embedding_A if name in names]
        return plan_by_peft(self, self, super().merge, ordered)

    def current_base(self) -> nn.Module:
        return self.get_base_layer()

    def put_base(self, base: nn.Module) -> None:
        self.base_layer = base

    def __repr__(self) -> str:
        rep: Any = super().__repr__()
        return rep.replace("lora.", "", 1)
