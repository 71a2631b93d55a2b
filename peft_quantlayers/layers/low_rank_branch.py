"""The low-rank branch of a quantized layer: an adapter that stays in the model without PEFT."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..integrations.private_transformers import mark_as_initialized


class LowRankBranch(nn.Module):
    """Adds ``x @ A.T @ B.T`` to a quantized layer's result. Not trained; saved with the model.

    Attributes:
        A: (r, in_features), floating.
        B: (out_features, r), floating, an adapter's scaling included.
    """

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(A.detach(), requires_grad=False)
        self.B = nn.Parameter(B.detach(), requires_grad=False)
        mark_as_initialized(self)

    @classmethod
    def empty(
        cls, rank: int, *, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device | str
    ) -> LowRankBranch:
        """A branch of uninitialised tensors, to load a checkpoint into.

        Raises:
            ValueError: ``rank`` is not an integer from 1 to ``MAX_RANK``.
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
            raise ValueError(f"the rank of a branch is {rank!r}; it must lie between 1 and {MAX_RANK}.")
        A = torch.empty(rank, in_features, dtype=dtype, device=device)
        return cls(A, torch.empty(out_features, rank, dtype=dtype, device=device))

    @property
    def rank(self) -> int:
        """Columns of ``B``."""
        return self.B.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.A.nbytes + self.B.nbytes

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x.to(self.A.dtype), self.A), self.B)

    def dense(self) -> Tensor:
        """``B @ A``, (out_features, in_features), float32."""
        return self.B.float() @ self.A.float()

    def extra_repr(self) -> str:
        return f"rank={self.rank}, dtype={self.A.dtype}"


# The ranks of several adapters kept together add up, so the layer's shape is not a bound.
MAX_RANK = 1 << 16
