"""The low-rank branches of a quantized stack: an adapter on experts that stays in the model without PEFT."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlayers_kernels.branch_products import Branch

from .low_rank_branch import LowRankBranch


class StackBranch(LowRankBranch):
    """Adds ``x @ A[e].T @ B[e].T`` to the result of each expert ``e``. Not trained; saved with the model.

    Attributes:
        A: (n_experts, r, in_features), floating.
        B: (n_experts, out_features, r), floating, an adapter's scaling included.
    """

    @classmethod
    def empty_stack(
        cls, rank: int, shape: tuple[int, int, int], *, dtype: torch.dtype, device: torch.device | str
    ) -> StackBranch:
        """Uninitialised branches beside weights of ``shape`` (n_experts, out_features, in_features); see
        :meth:`LowRankBranch.empty`."""
        n_experts, out_features, in_features = shape
        first = LowRankBranch.empty(
            rank, out_features=out_features, in_features=in_features, dtype=dtype, device="meta"
        )
        A, B = (torch.empty(n_experts, *part.shape, dtype=dtype, device=device) for part in (first.A, first.B))
        return cls(A, B)

    @property
    def rank(self) -> int:
        """Columns of each ``B``."""
        return self.B.shape[2]

    def of_all(self) -> Branch:
        """The branch beside all experts."""
        return Branch(self.A, self.B, 1.0)

    def dense_of(self, expert: int) -> Tensor:
        """``B[e] @ A[e]``, (out_features, in_features), float32."""
        return self.B[expert].float() @ self.A[expert].float()

    def dense(self) -> Tensor:
        """All experts' :meth:`dense_of`, (n_experts, out_features, in_features), float32."""
        return torch.bmm(self.B.float(), self.A.float())
