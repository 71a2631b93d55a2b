"""Read from a model what is quantized in it, to what, and what stays dense and why: by the rules that select."""

import math
from collections import Counter
from collections.abc import Collection
from typing import cast

from torch import nn

from ..arguments import check_model
from ..formats import QuantSpec
from ..integrations.base_modules import base_model, base_modules
from ..layers import DenseType, QuantizedEmbedding, QuantizedLinear
from ..layers.dense_rules import MISFIT, ROUTER, DenseRules, StaysDense
from ..layers.dense_types import dense_type_of
from ..layers.embedding_tables import EMBEDDING
from ..layers.expert_types import FusedWeight, fused_weights
from ..layers.quantized_layers import QuantizedLayer, quantized_layers
from ..layers.quantized_storage import QuantizedStorage
from ..layers.selection import Selection, fused_experts, select_modules
from ..layers.stack import QuantizedStack
from ..lora import has_adapters
from ..methods import QuantConfig
from ..methods.quant_config import check_config
from .model_summary import ModelSummary, ModuleSummary

# Of a module of a registered type in a model whose config is not at hand.
LEFT_OUT = "left dense by the config"
NOT_QUANTIZED = "not quantized"
# Of the other modules, whose type is not registered.
UNKNOWN_LINEAR = "unknown type of linear"
FUSED_EXPERTS = "fused experts"
CONVOLUTION = "convolution"
VECTORS = "norms, biases and scalars"
OTHER = "other parameters"

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def summary(model: nn.Module, config: QuantConfig | None = None) -> ModelSummary:
    """What is quantized in ``model``, to what, what stays dense and why, and the bytes of each. Changes nothing.

    Args:
        model: quantized in memory or loaded, on any device, with PEFT adapters or without; or a float model.
        config: show what this config would make of ``model``, instead of what it is.

    Raises:
        TypeError: no module, or no config.
        ValueError: what :func:`peft_quantlayers.quantize_model` would refuse about shapes and patterns; a config for
            a model that carries adapters.
    """
    check_model("summary", model)
    if config is not None:
        check_config("config", config)
    if config is not None and has_adapters(model):
        raise ValueError("a model that carries PEFT adapters cannot be quantized. Leave config out to see what it is.")
    base = base_model(model)
    selection = None if config is None else select_modules(base, config)
    specs = {} if selection is None else selection.specs
    tables = {} if selection is None else selection.tables
    planned_tables = {name: (table, spec) for table, spec in tables.values() for name in table.names}
    reasons = _Reasons(base, selection)
    owners: dict[int, str] = {}
    found = []
    for name, module in base_modules(model):
        parameters = list(module.parameters(recurse=isinstance(module, QuantizedStorage)))
        for stack in _dense_stacks(module):
            parameter = getattr(module, stack.parameter)
            stack_name = f"{name}.{stack.parameter}"
            parameters = [each for each in parameters if each is not parameter]
            if stack_name in specs:
                found.append(_planned(stack_name, stack.shape(module), None, specs[stack_name]))
            else:
                found.append(_dense(stack_name, reasons.of_fused(stack_name, stack.shape(module)), [parameter], set()))
            owners[id(parameter)] = stack_name
        own = [parameter for parameter in parameters if id(parameter) not in owners]
        shared = {owners[id(parameter)] for parameter in parameters if id(parameter) in owners}
        if isinstance(module, (QuantizedLinear, QuantizedStack, QuantizedEmbedding)):
            found.append(_quantized(name, module, own, shared))
        elif name in planned_tables:
            table, spec = planned_tables[name]
            bias = next((each for each in own if each is getattr(module, "bias", None)), None)
            shared |= set(table.names[:1]) - {name}
            found.append(_planned(name, table.shape, bias, spec, shared_with=shared))
        elif name in specs:
            shape = cast(DenseType, dense_type_of(module)).shape(module)
            found.append(_planned(name, shape, cast(nn.Parameter | None, module.bias), specs[name]))
        elif parameters:
            found.append(_dense(name, reasons.of(name, module), own, shared))
        owners |= {id(parameter): name for parameter in own}
    adapters = [parameter for parameter in model.parameters() if id(parameter) not in owners]
    return ModelSummary(
        model=type(base).__name__,
        modules=tuple(found),
        adapter_parameters=sum(parameter.numel() for parameter in adapters),
        adapter_nbytes=sum(parameter.nbytes for parameter in adapters),
        is_planned=config is not None,
    )


class _Reasons:
    """Why modules of ``model`` are dense: as ``selection`` says, or as the rules say where no config is at hand."""

    def __init__(self, model: nn.Module, selection: Selection | None) -> None:
        self._selection = selection
        self._rules = DenseRules(model)
        # With PEFT's parts, as the rules know them.
        self._names = {id(module): name for name, module in model.named_modules()}
        self._specs = Counter(layer.spec for layer in quantized_layers(model).values())
        self._experts = {id(parameter) for parameter in fused_experts(model).values()}

    def of(self, name: str, module: nn.Module) -> StaysDense:
        """``name``: without PEFT's parts."""
        if dense_type_of(module) is None:
            return self._of_unregistered(module)
        return self._of_left_out(module) if self._selection is None else self._selection.dense[name]

    def of_fused(self, name: str, shape: tuple[int, int, int]) -> StaysDense:
        """Of a fused weight of experts; ``name``: without PEFT's parts."""
        if self._selection is not None:
            return self._selection.dense[name]
        if not self._specs:
            return StaysDense(reason=FUSED_EXPERTS)
        spec = self._specs.most_common(1)[0][0]
        fits = spec.fitted(*shape[1:]) is not None
        return StaysDense(reason=FUSED_EXPERTS, detail=LEFT_OUT if fits else spec.misfit(*shape[1:]))

    def _of_left_out(self, module: nn.Module) -> StaysDense:
        found = self._rules.reason(self._names[id(module)], module)
        if found is not None or not self._specs:
            return found or StaysDense(reason=NOT_QUANTIZED)
        spec, shape = self._specs.most_common(1)[0][0], cast(DenseType, dense_type_of(module)).shape(module)
        return StaysDense(reason=LEFT_OUT if spec.fitted(*shape) else MISFIT, detail=spec.misfit(*shape))

    def _of_unregistered(self, module: nn.Module) -> StaysDense:
        parameters, kind = list(module.parameters(recurse=False)), type(module).__name__
        if any(id(parameter) in self._experts for parameter in parameters):
            return StaysDense(reason=FUSED_EXPERTS)
        if all(parameter.dim() <= 1 for parameter in parameters):
            return StaysDense(reason=VECTORS)
        if self._rules.is_router(self._names[id(module)]):
            return StaysDense(reason=ROUTER, detail=kind)
        if isinstance(module, nn.Linear):
            return StaysDense(reason=UNKNOWN_LINEAR, detail=kind)
        if isinstance(module, nn.Embedding):
            asked = {} if self._selection is None else self._selection.dense_tables
            return asked.get(self._names[id(module)], StaysDense(reason=EMBEDDING))
        if isinstance(module, CONVOLUTIONS):
            return StaysDense(reason=CONVOLUTION)
        return StaysDense(reason=OTHER, detail=kind)


def _dense_stacks(module: nn.Module) -> list[FusedWeight]:
    """The fused weights of experts that are dense parameters of ``module``."""
    return [entry for entry in fused_weights(module) if isinstance(getattr(module, entry.parameter), nn.Parameter)]


def _quantized(name: str, layer: QuantizedLayer, own: list[nn.Parameter], shared: set[str]) -> ModuleSummary:
    is_first = any(parameter is layer.codes for parameter in own)
    bias = getattr(layer, "bias", None)
    n_bias = sum(parameter.numel() for parameter in own if parameter is bias)
    n_weights = math.prod((*layer.leading, layer.out_features, layer.in_features)) if is_first else 0
    return ModuleSummary(
        name=name,
        spec=layer.spec,
        detail=_sharing(shared),
        n_parameters=n_weights + n_bias,
        nbytes=sum(parameter.nbytes for parameter in own),
        bits_per_weight=layer.bits_per_weight,
    )


def _planned(
    name: str, shape: tuple[int, ...], bias: nn.Parameter | None, spec: QuantSpec, *, shared_with: Collection[str] = ()
) -> ModuleSummary:
    layout = [] if shared_with else spec.layout_of(shape).values()
    return ModuleSummary(
        name=name,
        spec=spec,
        detail=_sharing(shared_with),
        n_parameters=(0 if shared_with else math.prod(shape)) + (0 if bias is None else bias.numel()),
        nbytes=sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in layout)
        + (0 if bias is None else bias.nbytes),
        bits_per_weight=spec.bits_per_weight(*shape[-2:])[1],
    )


def _sharing(names: Collection[str]) -> str:
    return f"shares a tensor with {', '.join(sorted(names))}" if names else ""


def _dense(name: str, dense: StaysDense, own: list[nn.Parameter], shared: set[str]) -> ModuleSummary:
    return ModuleSummary(
        name=name,
        reason=dense.reason,
        detail="; ".join(filter(None, [dense.detail, _sharing(shared)])),
        n_parameters=sum(parameter.numel() for parameter in own),
        nbytes=sum(parameter.nbytes for parameter in own),
    )
