"""The rounded weight of merge-aware training, for methods that cannot round a delta tile by tile.

Choosing codes costs more than a product with them. So the codes are kept. In training they are chosen again only after
the adapters have changed several times; in evaluation after every change, so that it uses the merged weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import QuantizedWeight
from ..layers import QuantizedLinear

# Changes of the adapters, that is optimizer steps, that share one choice of codes.
STEPS_PER_CHOICE = 4


class RoundedWeight:
    """``Q(W + left @ right)`` of one layer, and the factors of its last call."""

    def __init__(self) -> None:
        self._weight: QuantizedWeight | None = None
        self._seen: tuple[int, Tensor, Tensor] | None = None
        self._n_changes = 0

    def __getstate__(self) -> dict[str, object]:
        """Nothing: a copy chooses its own codes."""
        return RoundedWeight().__dict__

    @torch.compiler.disable
    def weight(self, base: QuantizedLinear, left: Tensor, right: Tensor, *, may_lag: bool) -> QuantizedWeight:
        """The rounded weight.

        Args:
            base: the layer that the delta is added to.
            left: (out_features, r), float32.
            right: (r, in_features), float32.
            may_lag: whether codes from up to ``STEPS_PER_CHOICE`` changes ago may be used.
        """
        left, right = left.detach(), right.detach()
        if not self._is_seen(base, left, right):
            self._n_changes += 1
            self._seen = (base.n_writes, left, right)
        if self._weight is None or self._n_changes >= (STEPS_PER_CHOICE if may_lag else 1):
            with torch.no_grad(), torch.autocast(left.device.type, enabled=False):
                self._weight = base.method.merged(base.quantized_weight, lambda rows: left[rows] @ right)
            self._n_changes = 0
        return self._weight

    def _is_seen(self, base: QuantizedLinear, left: Tensor, right: Tensor) -> bool:
        if self._seen is None:
            return False
        n_writes, seen_left, seen_right = self._seen
        if n_writes != base.n_writes or seen_left.shape != left.shape or seen_left.device != left.device:
            self._weight = None
            return False
        return torch.equal(seen_left, left) and torch.equal(seen_right, right)
