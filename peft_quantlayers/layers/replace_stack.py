"""Replace fused parameters of experts by quantized stacks, and the other way round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import QuantizedWeight, QuantSpec
from ..formats.checkpoint import SENTINEL_SHAPE
from ..integrations.private_experts import use_quantized_experts
from .expert_types import FusedWeight, stack_at
from .quantize_weight import quantize_weight
from .stack import QuantizedStack, parameter_order

# Gives ``make(0)`` to ``make(n - 1)``, in order.
InTurns = Callable[[int, Callable[[int], QuantizedWeight]], Iterator[QuantizedWeight]]


def one_after_another(n: int, make: Callable[[int], QuantizedWeight]) -> Iterator[QuantizedWeight]:
    """All of them in this process."""
    return map(make, range(n))


def quantize_stack(
    model: nn.Module,
    name: str,
    spec: QuantSpec,
    *,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    hessian_of: Callable[[int], Tensor | None] = lambda expert: None,
    in_turns: InTurns = one_after_another,
) -> QuantizedStack:
    """Replace the fused parameter ``name`` by its quantized form, one expert at a time, and return that.

    ``hessian_of`` gives the second moment of an expert's inputs, as in :meth:`QuantMethod.quantize`. ``in_turns``
    may have other processes quantize some of the experts.
    """
    module, entry = stack_at(model, name)
    dense = entry.weight(module).detach()

    def quantized_of(expert: int) -> QuantizedWeight:
        return quantized_expert(
            dense[expert], expert, spec, layer_name=name, device=device, hessian=hessian_of(expert)
        )

    quantized = QuantizedWeight.stacked(in_turns(len(dense), quantized_of), len(dense))
    return put_stack(module, entry, quantized.to(dense.device), name=name, compute_dtype=compute_dtype or dense.dtype)


def quantized_experts(
    weights: Iterable[Tensor],
    n_experts: int,
    spec: QuantSpec,
    *,
    layer_name: str,
    device: torch.device | str | None = None,
    hessian_of: Callable[[int], Tensor | None] = lambda expert: None,
) -> QuantizedWeight:
    """A stack of the ``n_experts`` weights (out_features, in_features), each quantized before the next is taken."""
    quantized = (
        quantized_expert(weight, expert, spec, layer_name=layer_name, device=device, hessian=hessian_of(expert))
        for expert, weight in enumerate(weights)
    )
    return QuantizedWeight.stacked(quantized, n_experts)


def quantized_expert(
    weight: Tensor,
    expert: int,
    spec: QuantSpec,
    *,
    layer_name: str,
    device: torch.device | str | None,
    hessian: Tensor | None,
) -> QuantizedWeight:
    """The weight (out_features, in_features) of one expert of a stack, quantized on ``device``."""
    weight = weight if device is None else weight.to(device)
    try:
        return quantize_weight(weight, spec, layer_name=layer_name, hessian=hessian)
    except ValueError as error:
        raise ValueError(f"{error} (Expert {expert}.)") from None


def put_stack(
    module: nn.Module, entry: FusedWeight, quantized: QuantizedWeight, *, name: str, compute_dtype: torch.dtype
) -> QuantizedStack:
    """Put a stack of ``quantized`` in place of the fused parameter of ``module``, or of a stack that is there."""
    stack = QuantizedStack(
        quantized,
        compute_dtype=compute_dtype,
        layer_name=name,
        is_transposed=entry.is_transposed,
        parameter_order=parameter_order(module),
    )
    if not any(isinstance(child, QuantizedStack) for child in module.children()):
        module.register_load_state_dict_pre_hook(_drop_sentinels)
    delattr(module, entry.parameter)
    module.add_module(entry.parameter, stack.train(module.training))
    use_quantized_experts(module)
    return stack


def _drop_sentinels(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before an experts module loads: a sentinel has the name of a stack, which only the module around it sees."""
    for name, child in module.named_children():
        sentinel = state_dict.get(key := prefix + name)
        if isinstance(child, QuantizedStack) and sentinel is not None and tuple(sentinel.shape) == SENTINEL_SHAPE:
            del state_dict[key]


def place_empty_stack(
    model: nn.Module, name: str, spec: QuantSpec, *, compute_dtype: torch.dtype | None, device: torch.device | str
) -> QuantizedStack:
    """Replace the fused parameter ``name`` by a stack with uninitialised tensors, to load a checkpoint into."""
    module, entry = stack_at(model, name)
    dtype = compute_dtype or entry.weight(module).dtype
    quantized = QuantizedWeight.empty(spec, entry.shape(module), device)
    return put_stack(module, entry, quantized, name=name, compute_dtype=dtype)


def put_dense(module: nn.Module, parameter_name: str, parameter: nn.Parameter) -> None:
    """Put ``parameter``, shaped as the fused parameter was, in place of the stack of that name."""
    order = parameter_order(module)
    delattr(module, parameter_name)
    module.register_parameter(parameter_name, parameter)
    for name in order:  # PEFT nests the adapters of one module in this order
        if name in module._parameters:
            module._parameters[name] = module._parameters.pop(name)
