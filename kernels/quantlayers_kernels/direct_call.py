"""When an operator's plain Python body may be called directly, without going through torch's dispatcher.

A custom operator costs about 20 microseconds a call on a CPU, as much as decoding one token with a small layer. It is
needed for gradients, compilers, transforms and tensor subclasses; without any of these the body alone gives the same
result.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


@cache
def _is_plain(kind: type) -> bool:
    """Whether tensors of the class are plain memory: ``Tensor``, or a ``Parameter`` that overrides no torch call."""
    return kind is Tensor or (
        issubclass(kind, nn.Parameter)
        and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
        and kind.__torch_function__ is nn.Parameter.__torch_function__
    )


def can_skip_operator(*tensors: Tensor | None) -> bool:
    """Whether nothing but numbers is wanted of a call with these arguments.

    False while compiling, tracing, in a functorch transform, in a dispatch mode (fake tensors, FLOP counters) or with
    forward-mode derivatives; for tensor subclasses; and where a gradient is wanted.

    Raises:
        NotImplementedError: a forward-mode derivative of the result is asked for. A custom operator of torch has none,
            and drops it without a word, which would stand for zero.
    """
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
        raise NotImplementedError(
            "quantized layers have no forward-mode derivatives (torch.func.jvp, jacfwd, torch.autograd.forward_ad). "
            "Use reverse mode (backward, torch.autograd.grad), or a dense copy of the model (dequantize_model)."
        )
    wants_gradients = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (not _is_plain(type(tensor)) or (wants_gradients and tensor.requires_grad)):
            return False
    return _is_undisturbed()


def is_cpu_inference(x: Tensor) -> bool:
    """Whether nothing but numbers is wanted of a call with the input ``x``, which is plain memory on the CPU.

    As :func:`can_skip_operator`, for a caller whose other tensors are plain; also False with autocast. It comes before
    anything that ``torch.compile`` should not look at.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(x) is Tensor
        and x.is_cpu
        and not x.is_neg()  # whose memory has the other sign
        and not torch.is_autocast_enabled("cpu")
        and _is_undisturbed()
    )


def _has_tangent(tensor: Tensor | None) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def _is_undisturbed() -> bool:
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )
