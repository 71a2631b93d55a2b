"""HQQ: products of sorted tokens with the weights of their experts, all experts in one call.

Compiled for CPUs with AMX, see ``csrc/hqq_experts.h``; :func:`can_use` says where. Elsewhere a caller multiplies
expert by expert. Autograd does not see these functions: one is the gradient of the other.
"""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from ..interface import ExpertTokens
from . import cpu

# The kernels look codes up among 32 values.
MAX_NBITS = 5
# A tile takes as many inputs, and as many outputs are decoded together; a group's codes are looked up as many at once.
MULTIPLE = 32


def can_use(
    x: Tensor,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    nbits: int,
    axis: int,
    in_features: int,
) -> bool:
    """Whether :func:`linear` and :func:`input_gradient` take these arguments: bfloat16 and AMX, and sizes that fit.

    Args:
        x: inputs, or gradients of the results.
        W_q, scale, zero: of all experts, as for :func:`.op.hqq_dequantize` with the expert as first dimension.
        nbits, axis, in_features: as there.
    """
    return (
        x.dtype == torch.bfloat16
        and x.is_cpu
        and nbits <= MAX_NBITS
        and axis == 1
        and W_q.dim() == scale.dim() == 3
        and in_features % MULTIPLE == 0
        and W_q.shape[1] % MULTIPLE == 0
        and in_features % (scale.shape[2] * MULTIPLE) == 0
        and native.has_matrix_tiles()
        and len(scale) == len(zero) == len(W_q) > 0
        and cpu.can_dequantize(W_q[0], scale[0], zero[0], nbits=nbits, axis=axis, in_features=in_features)
    )


def linear(x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, counts: Sequence[int], *, nbits: int) -> Tensor:
    """``x @ weight[e].T`` with each token's own expert; weights are rounded to bfloat16, sums are float32.

    Args:
        x: (n_tokens, in_features), bfloat16, sorted by expert.
        W_q, scale, zero, nbits: see :func:`can_use`.
        counts: tokens of each expert.

    Returns:
        (n_tokens, out_features), bfloat16.
    """
    y = x.new_empty(len(x), W_q.shape[1])
    _call("ql_hqq_experts_linear", x, y, (W_q, scale, zero), counts, nbits=nbits, in_features=x.shape[1])
    return y


def input_gradient(
    grad: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, counts: Sequence[int], *, nbits: int, in_features: int
) -> Tensor:
    """``grad @ weight[e]``: (n_tokens, out_features) to (n_tokens, in_features); as :func:`linear`."""
    y = grad.new_empty(len(grad), in_features)
    _call("ql_hqq_experts_gradient", grad, y, (W_q, scale, zero), counts, nbits=nbits, in_features=in_features)
    return y


def _call(
    kernel: str,
    x: Tensor,
    y: Tensor,
    tensors: Sequence[Tensor],
    counts: Sequence[int],
    *,
    nbits: int,
    in_features: int,
) -> None:
    x, (W_q, scale, zero) = x.contiguous(), (tensor.contiguous() for tensor in tensors)
    offsets = array("q", [0])
    for count in counts:
        offsets.append(offsets[-1] + count)
    if offsets[-1] != len(x) or len(counts) != len(W_q) or min(counts) < 0:
        raise ValueError(f"{len(x)} tokens do not fit the counts {list(counts)} of {len(W_q)} experts.")
    flat = (tensor.flatten(0, 1) for tensor in (W_q, scale, zero))
    tokens = ExpertTokens(
        y=y.data_ptr(),
        x=x.data_ptr(),
        offsets=offsets.buffer_info()[0],
        n_experts=len(counts),
        out_features=W_q.shape[1],
    )
    native.call(kernel, cpu.weight_of(*flat, nbits=nbits, axis=1, in_features=in_features), tokens)
