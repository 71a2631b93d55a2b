"""LoRA on a quantized embedding table: PEFT's layer, whose merges are undone to the bit."""

from __future__ import annotations

from typing import Any, cast

from peft.tuners.lora.layer import Embedding

from ..formats import QuantizedWeight
from ..layers import QuantizedEmbedding


class LoraQuantizedEmbedding(Embedding):
    """LoRA beside the lookup in a :class:`QuantizedEmbedding`. Merging quantizes the rows that a delta changes.

    ``merge_back`` merges it as one of PEFT's other tuners, with a report.
    """

    _unmerged: QuantizedWeight | None = None
    _n_writes: int = -1

    @property
    def _table(self) -> QuantizedEmbedding:
        return cast(QuantizedEmbedding, self.get_base_layer())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's."""
        table: Any = self.get_base_layer()
        if not isinstance(table, QuantizedEmbedding):  # a dense stand-in
            return super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if self.merged and not self._is_ours:  # unmerge will subtract what was merged before, and this too
            self._unmerged = None
            return super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        before = self.unmerged_weight
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if self.merged:
            self._unmerged, self._n_writes = before, table.n_writes

    def unmerge(self) -> None:
        """Restore the codes from before the merge; by subtraction where the table was written since."""
        if self.merged and self._is_ours:
            self._table.quantized_weight = cast(QuantizedWeight, self._unmerged).to(self._table.codes.device)
            self.merged_adapters.clear()
        else:
            super().unmerge()
        self._unmerged = None

    @property
    def unmerged_weight(self) -> QuantizedWeight | None:
        """The table without merges; as it is where it was written since, and None for a dense one."""
        table: Any = self.get_base_layer()
        if not isinstance(table, QuantizedEmbedding):
            return None
        return self._unmerged if self.merged and self._is_ours else table.quantized_weight

    @property
    def _is_ours(self) -> bool:
        return self._unmerged is not None and self._n_writes == self._table.n_writes

    def __repr__(self) -> str:
        rep: Any = super().__repr__()
        return rep.replace("lora.", "", 1)
