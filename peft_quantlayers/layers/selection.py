"""Which modules of a model a config selects, checked before anything is changed."""

import logging
from collections.abc import Iterator

import torch
from torch import nn

from ..arguments import check_model
from ..formats import QuantSpec
from ..methods import QuantConfig
from ..methods.config import matches
from .dense_types import dense_shape, dense_type_of, dense_weight
from .linear import QuantizedLinear

logger = logging.getLogger(__name__)


def quantized_modules(model: nn.Module) -> dict[str, QuantizedLinear]:
    """All quantized layers of ``model`` by name; TypeError if it is no module."""
    check_model("quantized_modules", model)
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def quantizable_modules(model: nn.Module, config: QuantConfig) -> dict[str, QuantSpec]:
    """Name and spec of every module that ``config`` selects, checked; nothing is changed.

    These are all modules of a registered type (:mod:`.dense_types`) except the output head, the modules that
    ``skip_modules`` matches, and modules that share their weight with another one. Layers that an earlier call
    quantized to the requested spec stay as they are, so that an interrupted run can continue.

    Raises:
        ValueError: nothing to quantize; a layer is quantized already, to another spec; a shape does not fit its spec;
            a pattern in ``skip_modules`` or ``overrides`` matches no module. Names the first five such layers.
    """
    if dense_type_of(model) is not None:
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
        entry = dense_type_of(module)
        if entry is None or name in heads or config.is_skipped(name) or id(module.weight) in shared:
            continue
        spec = config.spec_for(name)
        try:
            spec.tensor_layout(*entry.shape(module))
        except ValueError as error:
            problems.append(f"{name}: {error} Or skip it with skip_modules=[{name!r}].")
        specs[name] = spec
    if problems:
        shown = problems[:5] + ([f"... and {len(problems) - 5} more."] if len(problems) > 5 else [])
        raise ValueError("the model cannot be quantized, and was not changed:\n  " + "\n  ".join(shown))
    _check_overrides([*specs, *done], config)
    _warn_of_dense_experts(model)
    _check_rest(specs, done)
    _warn_of_large_metadata(model, specs)
    return specs


def finished_modules(model: nn.Module, config: QuantConfig) -> list[str]:
    """Names of the layers that are already quantized to the spec that ``config`` has for them."""
    return [
        name
        for name, layer in quantized_modules(model).items()
        if not config.is_skipped(name) and layer.spec in (config.spec_for(name), config.spec_for(name).widened())
    ]


def checked_modules(model: nn.Module, config: QuantConfig) -> dict[str, QuantSpec]:
    """:func:`quantizable_modules`, with all weights checked too; ValueError if one is not finite."""
    specs = quantizable_modules(model, config)
    not_finite = [name for name in specs if not _is_finite(dense_weight(model, name))]
    if not_finite:
        raise ValueError(
            f"the weights of {not_finite[:5]} hold NaN or Inf ({len(not_finite)} layer(s)); the model was not "
            f"changed. Repair the checkpoint, or skip the layers with skip_modules={not_finite[:5]}."
        )
    return specs


def _is_finite(weight: torch.Tensor) -> bool:
    low, high = torch.aminmax(weight.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _head_modules(model: nn.Module) -> Iterator[str]:
    """Dense modules outside the base model of a transformers model: the heads of any task."""
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not isinstance(getattr(model, prefix, None), nn.Module):
        return
    body = {id(module) for module in getattr(model, prefix).modules()}
    for name, module in model.named_modules():
        if dense_type_of(module) is not None and id(module) not in body:
            yield name


def _shared_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that the model holds in more than one place: tied embeddings, a module with two names."""
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
                f"To match all layers inside a module write {pattern + '.*'!r}. The output head is quantized with "
                "quantize_lm_head=True only."
            )


def _check_rest(specs: dict[str, QuantSpec], done: list[str]) -> None:
    """Raise ValueError if nothing is left to quantize; warn if some layers are quantized already."""
    if done and not specs:
        raise ValueError(
            f"all {len(done)} layers are quantized already as the config says; the model was not changed."
        )
    if not specs:
        raise ValueError(
            "there is nothing to quantize: outside its head the model has no nn.Linear, Conv1D or other registered "
            "layer type that skip_modules does not name."
        )
    if done:
        logger.warning(
            "%d of %d layers are quantized already as the config says, and stay as they are.",
            len(done),
            len(done) + len(specs),
        )


def _warn_of_large_metadata(model: nn.Module, specs: dict[str, QuantSpec]) -> None:
    """Warn if scales and codebooks take more memory than the codes: the layers are too small for the spec."""
    found = []
    for name, spec in specs.items():
        codes, total = spec.bits_per_weight(*dense_shape(model, name))
        if total > 2 * codes + 1e-6:
            found.append((name, codes, total))
    if found:
        name, codes, total = max(found, key=lambda entry: entry[2] / entry[1])
        better = specs[name].smaller_metadata(*dense_shape(model, name))
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
