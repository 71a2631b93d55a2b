"""Find the linear layers of a model that a config means, and put quantized ones in their place."""

import logging
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..formats import QuantSpec
from ..methods import QuantConfig
from ..methods.config import matches
from .linear import CONV1D, LINEAR, QuantizedLinear

logger = logging.getLogger(__name__)


def quantized_modules(model: nn.Module) -> dict[str, QuantizedLinear]:
    """All quantized layers of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def linear_shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """(out_features, in_features); transformers' Conv1D keeps its weight the other way round."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return module.out_features, module.in_features


def quantizable_modules(model: nn.Module, config: QuantConfig) -> dict[str, QuantSpec]:
    """Name and spec of every module that ``config`` means, checked: nothing is changed yet.

    Those are all ``nn.Linear`` (no subclass of it, whose forward may differ) and ``Conv1D`` modules but the
    output head, what ``skip_modules`` names, and modules that share their weight with another one. Layers that a
    call before this one quantized to the very spec asked for stay as they are, so that a run that was interrupted
    can go on.

    Raises:
        ValueError: nothing to quantize; a layer is quantized already, to another spec; a shape does not fit its spec;
            a pattern in ``skip_modules`` or ``overrides`` matches no module. All layers at fault are named.
    """
    if isinstance(model, (nn.Linear, Conv1D)):
        raise ValueError(
            "the model is a single linear layer. Quantize it with HQQLinear.from_linear(layer, HQQSpec(...)), or put "
            "it into a module."
        )
    _check_patterns(model, config)
    heads = set() if config.quantize_lm_head else set(_head_modules(model))
    shared = _shared_parameters(model)
    specs: dict[str, QuantSpec] = {}
    problems: list[str] = []
    done = finished_modules(model, config)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and name not in done and not config.is_skipped(name):
            problems.append(f"{name}: the layer is quantized already ({module.extra_repr()}).")
        if type(module) not in (nn.Linear, Conv1D) or name in heads or config.is_skipped(name):
            continue
        if id(module.weight) in shared:
            continue
        spec = config.spec_for(name)
        try:
            spec.tensor_layout(*linear_shape(module))
        except ValueError as error:
            problems.append(f"{name}: {error} Or skip it with skip_modules=[{name!r}].")
        specs[name] = spec
    if problems:
        shown = problems[:5] + ([f"... and {len(problems) - 5} more."] if len(problems) > 5 else [])
        raise ValueError("the model cannot be quantized, and was not changed:\n  " + "\n  ".join(shown))
    _check_overrides([*specs, *done], config)
    _warn_of_dense_experts(model)
    if done and not specs:
        raise ValueError(
            f"all {len(done)} layers are quantized already as the config says; the model was not changed."
        )
    if done:
        logger.warning(
            "%d of %d layers are quantized already as the config says, and stay as they are.",
            len(done),
            len(done) + len(specs),
        )
    if not specs:
        raise ValueError(
            "there is nothing to quantize: the model has no plain nn.Linear or Conv1D layer outside its head that "
            "skip_modules leaves over."
        )
    _warn_of_large_metadata(model, specs)
    return specs


def finished_modules(model: nn.Module, config: QuantConfig) -> list[str]:
    """Names of the layers that are quantized already, to the spec that ``config`` asks for there."""
    return [
        name
        for name, layer in quantized_modules(model).items()
        if not config.is_skipped(name) and layer.spec in (config.spec_for(name), config.spec_for(name).widened())
    ]


def checked_modules(model: nn.Module, config: QuantConfig) -> dict[str, QuantSpec]:
    """:func:`quantizable_modules` after a look at all weights; ValueError where one is not finite."""
    specs = quantizable_modules(model, config)
    not_finite = [name for name in specs if not _is_finite(_linear_at(model, name).weight)]
    if not_finite:
        raise ValueError(
            f"the weights of {not_finite[:5]} hold NaN or Inf ({len(not_finite)} layer(s)); the model was not "
            f"changed. Repair the checkpoint, or skip the layers with skip_modules={not_finite[:5]}."
        )
    return specs


def quantize_modules(
    model: nn.Module,
    config: QuantConfig,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> nn.Module:
    """Quantize the linear layers of ``model`` in place, one at a time, and return it.

    What :func:`peft_quantlayers.quantize_model` does for any module, without making a transformers model known as
    quantized; arguments and errors are the same.
    """
    quantize_each(model, checked_modules(model, config), config, device=device, progress=progress)
    return model


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


def quantize_module(
    model: nn.Module,
    name: str,
    spec: QuantSpec,
    *,
    compute_dtype: str | None = None,
    device: torch.device | str | None = None,
    hessian: torch.Tensor | None = None,
) -> QuantizedLinear:
    """Replace the module ``name`` of ``model`` by its quantized form, and return that.

    ``hessian`` is the second moment of its inputs, as in :meth:`QuantMethod.quantize`.
    """
    linear = _linear_at(model, name)
    weight, bias = linear_of(model, name)
    home = weight.device
    if device is not None:
        weight = weight.to(device)
    dense = _linear_over(weight, bias, linear.training)
    layer = QuantizedLinear.from_linear(dense, spec, layer_name=name, hessian=hessian)
    layer.dense_type = CONV1D if isinstance(linear, Conv1D) else LINEAR
    if device is not None:
        layer.to(home)
    if compute_dtype is not None:
        layer.compute_dtype = getattr(torch, compute_dtype)
    model.set_submodule(name, layer)
    return layer


def place_empty_layer(
    model: nn.Module, name: str, spec: QuantSpec, *, compute_dtype: str | None, device: torch.device | str
) -> QuantizedLinear:
    """Put a quantized layer with uninitialised tensors in the place of the linear module ``name``, and return it.

    For a checkpoint to be loaded into. The bias, uninitialised too, keeps the dtype that it has.
    """
    linear = _linear_at(model, name)
    out_features, in_features = linear_shape(linear)
    layer = QuantizedLinear.empty(
        spec,
        out_features=out_features,
        in_features=in_features,
        bias=linear.bias is not None,
        compute_dtype=getattr(torch, compute_dtype) if compute_dtype else linear.weight.dtype,
        device=device,
        layer_name=name,
    )
    if linear.bias is not None:
        layer.bias = nn.Parameter(torch.empty_like(linear.bias, device=device))
    layer.dense_type = CONV1D if isinstance(linear, Conv1D) else LINEAR
    model.set_submodule(name, layer.train(linear.training))
    return layer


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every quantized layer of ``model`` by a plain one with its dequantized weight, in place.

    Args:
        model: any module; a transformers model also loses its quantization config.
        dtype: dtype of the weights; None for each layer's ``compute_dtype``.
    """
    for name, layer in quantized_modules(model).items():
        weight = layer.dense_weight(dtype).detach()
        model.set_submodule(name, dense_in_place_of(layer, weight, layer.bias))
    for module in model.modules():
        if "hf_quantizer" in vars(module):  # the transformers model, which may lie inside a PEFT model
            cast(Any, module.hf_quantizer).remove_quantization_config(module)
    return model


def dense_in_place_of(layer: QuantizedLinear, weight: torch.Tensor, bias: nn.Parameter | None) -> nn.Linear | Conv1D:
    """The ``nn.Linear`` or ``Conv1D`` that the model's architecture has in the place of ``layer``.

    Args:
        layer: the quantized layer.
        weight: (out_features, in_features).
        bias: (out_features,) or None.
    """
    if not layer.is_conv1d:
        return _linear_over(weight, bias, layer.training)
    with torch.device("meta"):
        conv = Conv1D(layer.out_features, layer.in_features)
    conv.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=False)
    conv.register_parameter("bias", bias)
    return conv.train(layer.training)


def linear_of(model: nn.Module, name: str) -> tuple[torch.Tensor, nn.Parameter | None]:
    """Weight (out_features, in_features) and bias of the linear module ``name``, a Conv1D's turned round."""
    linear = _linear_at(model, name)
    return (linear.weight.t() if isinstance(linear, Conv1D) else linear.weight), linear.bias


def _linear_at(model: nn.Module, name: str) -> nn.Linear:
    """The linear module ``name``; a Conv1D has the same attributes."""
    return cast(nn.Linear, model.get_submodule(name))


def _linear_over(weight: torch.Tensor, bias: nn.Parameter | None, training: bool) -> nn.Linear:
    """An ``nn.Linear`` around existing tensors, without initialising any."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    linear.register_parameter("bias", bias)
    return linear.train(training)


def _is_finite(weight: torch.Tensor) -> bool:
    low, high = torch.aminmax(weight.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _head_modules(model: nn.Module) -> Iterable[str]:
    """Linear modules outside the base model of a transformers model: the heads of whatever task."""
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not isinstance(getattr(model, prefix, None), nn.Module):
        return
    body = {id(module) for module in getattr(model, prefix).modules()}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) not in body:
            yield name


def _shared_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that more than one place of the model holds: tied embeddings, a module under two names."""
    owners: dict[int, int] = {}
    for parent in model.modules():
        for module in filter(None, parent._modules.values()):
            for parameter in module.parameters(recurse=False):
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {parameter for parameter, count in owners.items() if count > 1}


def _check_patterns(model: nn.Module, config: QuantConfig) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for field in ("skip_modules", "overrides"):
        for pattern in getattr(config, field) or ():
            if not any(matches(name, pattern) for name in names):
                raise ValueError(
                    f"{field}: the pattern {pattern!r} matches no module of the model, which was not changed. "
                    f"Names look like {names[len(names) // 2]!r}; a pattern may be the last part of a name, and "
                    "may hold * and ?."
                )


def _check_overrides(names: list[str], config: QuantConfig) -> None:
    for pattern in config.overrides or ():
        if names and not any(matches(name, pattern) for name in names):
            raise ValueError(
                f"overrides: the pattern {pattern!r} matches no layer that is quantized; the model was not changed. "
                f"To mean all layers inside a module write {pattern + '.*'!r}. The output head is quantized with "
                "quantize_lm_head=True only."
            )


def _warn_of_large_metadata(model: nn.Module, specs: dict[str, QuantSpec]) -> None:
    """Say so where scales and codebooks take more room than the codes: the layers are too small for them."""
    found = []
    for name, spec in specs.items():
        codes, total = spec.bits_per_weight(*linear_shape(_linear_at(model, name)))
        if total > 2 * codes + 1e-6:
            found.append((name, codes, total))
    if found:
        name, codes, total = max(found, key=lambda entry: entry[2] / entry[1])
        better = specs[name].smaller_metadata(*linear_shape(_linear_at(model, name)))
        logger.warning(
            "%d layer(s) take more bits for their metadata than for their codes, for example %s: %.1f bits per "
            "weight, of which codes are %.1f.%s",
            len(found),
            name,
            total,
            codes,
            f" For layers of this size use {better}." if better else "",
        )


def _warn_of_dense_experts(model: nn.Module) -> None:
    parameters = list(model.named_parameters())
    fused = {name: p.numel() for name, p in parameters if p.dim() == 3 and "experts" in name.split(".")}
    if fused:
        share = sum(fused.values()) / sum(p.numel() for _, p in parameters)
        logger.warning(
            "%.0f %% of the weights lie in fused experts (%s, ...), which are no linear layers and stay dense.",
            100 * share,
            next(iter(fused)),
        )
