"""Replace dense modules of a model by quantized layers, and the other way round; for fused weights of experts too."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn
from tqdm.auto import tqdm

from ..arguments import check_dtype, check_model
from ..formats import QuantizedWeight, QuantSpec
from ..integrations.private_experts import use_usual_experts
from ..integrations.private_transformers import kept_dtype, remove_quantization_config, tie_dense_weights
from ..methods import QuantConfig
from ..methods.base import InitialCodes
from .dense_types import dense_at
from .embedding import QuantizedEmbedding
from .embedding_tables import Table, quantize_table
from .expert_types import find_stack, fused_weights, stack_at
from .linear import QuantizedLinear, layer_type
from .placement import check_weights_are_here
from .quantized_layers import quantized_embeddings, quantized_modules, quantized_stacks
from .quantized_storage import QuantizedStorage
from .replace_stack import InTurns, one_after_another, place_empty_stack, put_dense, quantize_stack
from .stack import QuantizedStack


def quantize_each(
    model: nn.Module,
    specs: dict[str, QuantSpec],
    config: QuantConfig,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> None:
    """Quantize the modules ``specs`` of ``model`` in place, one at a time."""
    for name, spec in tqdm(specs.items(), desc="Quantizing", unit="layer", disable=not progress):
        quantize_module(model, name, spec, compute_dtype=config.compute_dtype, device=device)


def quantize_tables(
    model: nn.Module,
    tables: Mapping[str, tuple[Table, QuantSpec]],
    config: QuantConfig,
    *,
    device: torch.device | str | None = None,
) -> None:
    """Quantize the embedding tables of ``model`` in place, one at a time, each with all that shares its weight."""
    for table, spec in tables.values():
        quantize_table(model, table, spec, compute_dtype=config.compute_dtype, device=device)


def quantize_module(
    model: nn.Module,
    name: str,
    spec: QuantSpec,
    *,
    compute_dtype: str | None = None,
    device: torch.device | str | None = None,
    target: torch.Tensor | None = None,
    hessian: torch.Tensor | None = None,
    initial_codes: InitialCodes = "nearest",
    hessian_of: Callable[[int], torch.Tensor | None] | None = None,
    in_turns: InTurns = one_after_another,
) -> QuantizedStorage:
    """Replace the module ``name`` of ``model``, or the fused weight of that name, by its quantized form; return that.

    ``hessian`` is the second moment of its inputs, as in :meth:`QuantMethod.quantize`; ``hessian_of`` gives that of
    each expert of a fused weight, whose codes begin with the nearest, and which ``in_turns`` makes. ``target`` is the
    weight (out_features, in_features) to quantize in place of the module's own.
    """
    if find_stack(model, name) is not None:
        wanted = None if compute_dtype is None else getattr(torch, compute_dtype)
        dtype = kept_dtype(model, name, wanted) if wanted is not None else None
        dtype = wanted if dtype is None else getattr(torch, dtype)
        return quantize_stack(
            model,
            name,
            spec,
            compute_dtype=dtype,
            device=device,
            hessian_of=hessian_of or (lambda _: hessian),
            in_turns=in_turns,
        )
    module, entry = dense_at(model, name)
    weight, bias = linear_of(model, name)
    home, own_dtype = weight.device, weight.dtype
    weight = weight if target is None else target
    if device is not None:
        weight = weight.to(device)
    layer = QuantizedLinear.from_weight(
        weight,
        bias,
        spec,
        layer_name=name,
        hessian=hessian,
        initial_codes=initial_codes,
        dense_type=entry,
        compute_dtype=own_dtype,
    )
    layer.train(module.training)
    if device is not None:
        layer.to(home)
    if compute_dtype is not None:
        wanted = getattr(torch, compute_dtype)
        layer.compute_dtype = getattr(torch, kept_dtype(model, name, wanted) or compute_dtype)
    model.set_submodule(name, layer)
    return layer


def place_layer(
    model: nn.Module, name: str, quantized: QuantizedWeight, *, compute_dtype: torch.dtype
) -> QuantizedLinear:
    """Replace the dense module ``name`` of ``model`` by a layer with this weight, on the same device; return that."""
    module, entry = dense_at(model, name)
    weight, bias = linear_of(model, name)
    layer = layer_type(quantized.spec.method)(
        quantized.to(weight.device), compute_dtype=compute_dtype, layer_name=name, dense_type=entry
    )
    layer.register_parameter("bias", bias)
    model.set_submodule(name, layer.train(module.training))
    return layer


def place_empty_layer(
    model: nn.Module, name: str, spec: QuantSpec, *, compute_dtype: str | None, device: torch.device | str
) -> QuantizedLinear | QuantizedStack:
    """Replace the dense module or fused weight ``name`` by a quantized one with uninitialised tensors; return that.

    A checkpoint is loaded into it. The bias, uninitialised too, keeps its dtype.
    """
    if find_stack(model, name) is not None:
        dtype = getattr(torch, compute_dtype) if compute_dtype else None
        return place_empty_stack(model, name, spec, compute_dtype=dtype, device=device)
    module, entry = dense_at(model, name)
    weight, bias = linear_of(model, name)
    out_features, in_features = weight.shape
    layer = QuantizedLinear.empty(
        spec,
        out_features=out_features,
        in_features=in_features,
        bias=bias is not None,
        compute_dtype=getattr(torch, compute_dtype) if compute_dtype else weight.dtype,
        device=device,
        layer_name=name,
        dense_type=entry,
    )
    if bias is not None:
        layer.bias = nn.Parameter(torch.empty_like(bias, device=device))
    model.set_submodule(name, layer.train(module.training))
    return layer


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every quantized layer of ``model`` by a dense one with its dequantized weight, in place.

    Args:
        model: any module; a transformers model also loses its quantization config.
        dtype: dtype of the weights; None for each layer's ``compute_dtype``.

    Raises:
        TypeError: ``model`` is not a module, or ``dtype`` not a floating dtype.
        ValueError: weights are offloaded, sharded, or on the meta device; the model was not changed.
    """
    check_model("dequantize_model", model)
    check_dtype("dtype", dtype)
    check_weights_are_here(model, "dequantizing", if_sharded="Load the quantized model in one process.")
    weights: dict[int, nn.Parameter] = {}
    layers: dict[str, Any] = {**quantized_embeddings(model), **quantized_modules(model)}
    for name, layer in layers.items():
        module: Any
        if isinstance(layer, QuantizedEmbedding):
            module = layer.dense_table(dtype)
        else:
            module = layer.dense_with(layer.dense_weight(dtype).detach(), layer.bias)
        if layer.sharing and layer.branch is None:
            module.weight = weights.setdefault(id(layer.sharing[0]), module.weight)
        model.set_submodule(name, module)
    tie_dense_weights(model)
    for name, stack in quantized_stacks(model).items():
        experts, entry = stack_at(model, name)
        put_dense(experts, entry.parameter, nn.Parameter(stack.dense_weight(dtype), requires_grad=False))
    for experts in model.modules():  # only now: the experts of all layers share one config
        if fused_weights(experts):
            use_usual_experts(experts)
    remove_quantization_config(model)
    return model


def linear_of(model: nn.Module, name: str) -> tuple[torch.Tensor, nn.Parameter | None]:
    """Weight (out_features, in_features) and bias of the dense module ``name``."""
    module, entry = dense_at(model, name)
    return entry.weight(module), cast(nn.Parameter | None, module.bias)
