"""The low-rank branch of LoRA beside a product: its own autograd function, which keeps as little as there can be.

Composed of modules it keeps the input several times: cast to the adapter's dtype, and once more with dropout. Here it
is the input itself, which all layers that read it share, ``x @ A.T``, and a boolean for each dropped number.
"""

from typing import Any

import torch
from torch import Tensor

from .precision import product_dtype


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, *, scaling: float, dropout: float = 0.0) -> Tensor:
    """``y + scaling * dropout(x) @ A.T @ B.T``, differentiable in all four.

    Args:
        y: (..., out_features), floating. Its dtype is the result's.
        x: (..., in_features), floating.
        A: (r, in_features), floating. Products run in its dtype, or in that of autocast where it is on; see
            :func:`product_dtype` for halves on a CPU.
        B: (out_features, r), dtype of ``A``.
        scaling: of the branch.
        dropout: probability that a number of ``x`` counts as zero; the others grow by ``1 / (1 - dropout)``.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else A.dtype
    return _AddLowRank.apply(y, x, A, B, scaling, dropout, product_dtype(dtype, x.device))


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float, dtype: torch.dtype
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            kept = _coin_flips(x, 1 - dropout) if dropout > 0 else None
            hidden = _dropped(_rows(x, dtype), kept, dropout) @ A.to(dtype).t()
            result = torch.empty_like(y, memory_format=torch.contiguous_format)
            flat_y, flat_result = y.reshape(-1, y.shape[-1]), result.view(-1, y.shape[-1])
            if y.dtype == dtype:
                torch.addmm(flat_y, hidden, B.to(dtype).t(), alpha=scaling, out=flat_result)
            else:
                torch.add(flat_y, hidden @ B.to(dtype).t(), alpha=scaling, out=flat_result)
        ctx.save_for_backward(x, A, B, hidden, kept)
        ctx.scaling, ctx.dropout = scaling, dropout
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, hidden, kept = ctx.saved_tensors
        dtype = hidden.dtype
        grad_x = grad_A = grad_B = None
        with torch.autocast(x.device.type, enabled=False):
            rows = _rows(grad, dtype)
            if torch.is_grad_enabled():  # for a second derivative: what was saved does not know where it comes from
                hidden = _dropped(_rows(x, dtype), kept, ctx.dropout) @ A.to(dtype).t()
            if ctx.needs_input_grad[3]:
                grad_B = (ctx.scaling * (rows.t() @ hidden)).to(B.dtype)
            grad_hidden = ctx.scaling * (rows @ B.to(dtype))
            if ctx.needs_input_grad[2]:
                grad_A = (grad_hidden.t() @ _dropped(_rows(x, dtype), kept, ctx.dropout)).to(A.dtype)
            if ctx.needs_input_grad[1]:
                grad_x = _dropped(grad_hidden @ A.to(dtype), kept, ctx.dropout).view(x.shape).to(x.dtype)
        return grad, grad_x, grad_A, grad_B, None, None, None


def _coin_flips(x: Tensor, probability: float) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(probability)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)


def _dropped(rows: Tensor, kept: Tensor | None, dropout: float) -> Tensor:
    if kept is None:
        return rows
    return rows * kept.view(rows.shape) * (1 / (1 - dropout) if dropout < 1 else 0.0)
