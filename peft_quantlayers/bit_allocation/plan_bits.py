"""Measure what each layer costs in each form, on calibration data, and plan the bits of a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_flag, check_model, check_tokenizer, nearest
from ..calibration import Calibration, InputGroup, Visitor, walk
from ..calibration.model_calls import model_calls
from ..calibration.quantize_calibrated import check_can_calibrate
from ..formats import QuantSpec
from ..layers.dense_types import dense_shape, dense_weight
from ..layers.embedding_tables import Table
from ..layers.expert_types import find_stack
from ..layers.other_quantizers import refuse_other_quantizers
from ..layers.placement import check_weights_are_here
from ..layers.quantize_weight import quantize_weight
from ..layers.selection import checked_modules, quantizable_tables
from ..methods import QuantConfig, get_method
from ..methods.hqq import HQQConfig
from ..methods.quant_config import check_config, matches
from .bit_plan import BitPlan, LayerChoice
from .fisher_gradients import LayerSamples, sampled_gradients

# Tokens of the backward pass; a whole window of it is in memory with all that its gradient needs.
FISHER_TOKENS = 4096
# Rows of a weight that are quantized to measure it, where rows do not depend on each other.
ROWS = 256
# A choice that is given as a number is this field, the first of these that the config has.
NUMBER_FIELDS = ("nbits", "num_codebooks")
DEFAULT_CHOICES: dict[str, tuple[int, ...]] = {"nbits": (2, 3, 4), "num_codebooks": (1, 2, 3)}

Candidate = tuple[dict[str, Any], QuantSpec, int]
"""Of one form of a layer: the fields that differ, the spec and the bytes."""


def plan_bits(
    model: nn.Module,
    calibration: Any,
    *,
    average: float | None = None,
    size: int | str | None = None,
    choices: Sequence[int | Mapping[str, Any]] | None = None,
    config: QuantConfig | None = None,
    tokenizer: Any = None,
    progress: bool = True,
) -> BitPlan:
    """Plan which layers get more bits than others, so that the model's predictions change least; ``model`` stays.

    What a layer costs in one form is estimated by the Fisher information: half the mean of ``(g . e)^2`` for the error
    ``e`` of its outputs and the gradient ``g`` of the log-likelihood of targets drawn from the model. Layers whose
    ``overrides`` in ``config`` name a field of the choices keep that, and so do experts, whose cost is not measured.

    Args:
        model: a float model with logits, in memory.
        calibration: as in :func:`quantize_model`.
        average: stored bits per weight of the quantized layers, scales, zeros and codebooks included: 3 bits in groups
            of 64 take 3.5.
        size: bytes of all tensors of the quantized model, or text with a unit ("4GB" is 4 * 10**9, "4GiB" 4 * 2**30).
            A few kilobytes of names and checksums in the files come on top.
        choices: forms that a layer may take: fields of the config that differ, or numbers (of ``nbits``, or for AQLM
            of ``num_codebooks``). None for 2, 3 and 4 bits, or 1 to 3 codebooks.
        config: all other fields; None for ``HQQConfig()``.
        tokenizer: for texts, unless ``calibration`` is a :class:`Calibration`.
        progress: show progress bars.

    Returns:
        The plan; its ``overrides`` go into a config, and itself into ``quantize_model(budget=plan)``.

    Raises:
        TypeError: not one budget; a model without logits; arguments of other kinds.
        ValueError: a budget below the smallest choices; choices that the config does not know; all that
            :func:`quantize_model` refuses. The model was not changed.
    """
    check_model("plan_bits", model)
    check_flag("progress", progress)
    check_tokenizer(tokenizer)
    config = HQQConfig() if config is None else config
    check_config("config", config)
    fields = fields_of_choices(choices, config)
    check_weights_are_here(
        model,
        "planning bits",
        if_offloaded=" Load the model into memory to plan its bits.",
        if_sharded="Plan the bits in one process, and use the plan's overrides.",
    )
    refuse_other_quantizers(model)
    given = Calibration.of(calibration, tokenizer)
    specs = checked_modules(model, config)
    check_can_calibrate(specs, given)
    candidates = _candidates(model, config, specs, fields)
    empty = _unmeasured(model, config, candidates)
    empty.with_budget(average=average, size=size)  # refuses before anything is computed
    linear = [name for name in specs if find_stack(model, name) is None]
    samples = samples_of(model, linear, given)
    visitor = _MeasuringVisitor(model, candidates, samples, given)
    walk(model, linear, given, visitor, progress=progress)
    plan = dataclasses.replace(empty, layers={name: visitor.found.get(name, empty.layers[name]) for name in specs})
    return plan.with_budget(average=average, size=size)


def check_budget(
    model: nn.Module, config: QuantConfig, *, average: float | None = None, size: int | str | None = None
) -> None:
    """Raise ValueError if the budget is below the smallest of the choices that :func:`plan_bits` has by default."""
    candidates = _candidates(model, config, checked_modules(model, config), fields_of_choices(None, config))
    _unmeasured(model, config, candidates).with_budget(average=average, size=size)


def _unmeasured(model: nn.Module, config: QuantConfig, candidates: Mapping[str, list[Candidate]]) -> BitPlan:
    """A plan that knows the bytes of all forms, and not what they cost."""
    tables = quantizable_tables(model, config)
    return BitPlan(
        layers={
            name: [LayerChoice(fields=f, n_bytes=n, kl=0.0) for f, _, n in each] for name, each in candidates.items()
        },
        chosen=dict.fromkeys(candidates, 0),
        n_weights=sum(math.prod(dense_shape(model, name)) for name in candidates),
        other_bytes=_other_bytes(model, [*candidates, *tables]) + sum(map(_n_bytes_of_table, tables.values())),
    )


def samples_of(model: nn.Module, names: Sequence[str], calibration: Calibration) -> dict[str, LayerSamples]:
    """:func:`sampled_gradients` of the modules ``names`` on the first tokens of ``calibration``."""
    few = dataclasses.replace(calibration, n_tokens=min(calibration.n_tokens, FISHER_TOKENS), batch_size=1)
    return sampled_gradients(model, model_calls(model, few.batches(model)), names)


def fields_of_choices(choices: Sequence[int | Mapping[str, Any]] | None, config: QuantConfig) -> list[dict[str, Any]]:
    """Each choice as the fields that it sets. Raises as :func:`plan_bits`."""
    own = {field.name for field in dataclasses.fields(config.spec_type)}
    number = next((name for name in NUMBER_FIELDS if name in own), None)
    if choices is None and number is not None:
        choices = DEFAULT_CHOICES[number]
    if isinstance(choices, (str, Mapping)) or not isinstance(choices, Sequence) or not choices:
        raise TypeError(
            f"choices must be a list such as [2, 3, 4] or [{{'nbits': 3, 'group_size': 32}}], got {choices!r}."
        )
    found: list[dict[str, Any]] = []
    for choice in choices:
        if isinstance(choice, int) and not isinstance(choice, bool) and number is not None:
            choice = {number: choice}
        if not isinstance(choice, Mapping) or not choice:
            raise TypeError(f"a choice must be a number of bits or a mapping of fields, got {choice!r}.")
        if unknown := sorted(set(choice) - own, key=str):
            near = nearest(unknown[0], sorted(own))
            raise ValueError(
                f"choices name {unknown}, which {type(config).__name__} does not have for each layer{near}."
            )
        dataclasses.replace(config, overrides={"*": dict(choice)})  # refuses values
        found.append(dict(choice))
    return found


def _candidates(
    model: nn.Module, config: QuantConfig, specs: Mapping[str, QuantSpec], fields: list[dict[str, Any]]
) -> dict[str, list[Candidate]]:
    """For each layer the fields, the spec and the bytes of its forms; one only for those that are not planned."""
    planned = {key for each in fields for key in each}
    found: dict[str, list[Candidate]] = {}
    for name, own in specs.items():
        shape = dense_shape(model, name)
        pinned = {key for pattern, each in (config.overrides or {}).items() if matches(name, pattern) for key in each}
        layer_fields = [{}] if pinned & planned or find_stack(model, name) is not None else fields
        for each in layer_fields:
            spec = own
            if each:
                changed = dataclasses.replace(config, overrides={**(config.overrides or {}), name: each})
                fitted = changed.fitted_spec(changed.spec_for(name), *shape[-2:])
                if fitted is None:
                    continue
                spec = fitted
            found.setdefault(name, []).append((each, spec, spec_bytes(spec, shape)))
        found.setdefault(name, [({}, own, spec_bytes(own, shape))])
    return found


def spec_bytes(spec: QuantSpec, shape: tuple[int, ...]) -> int:
    """Stored bytes of a weight of this shape, metadata included."""
    return sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in spec.layout_of(shape).values())


def _n_bytes_of_table(planned: tuple[Table, QuantSpec]) -> int:
    return spec_bytes(planned[1], planned[0].shape)


def _other_bytes(model: nn.Module, names: Sequence[str]) -> int:
    """Bytes of the tensors in the model's state that are not the weights ``names``, shared ones once."""
    quantized = {dense_weight(model, name).untyped_storage().data_ptr() for name in names}
    tensors = {tensor.untyped_storage().data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.nbytes for place, tensor in tensors.items() if place not in quantized)


class _MeasuringVisitor(Visitor):
    """Quantizes each layer in all its forms, and keeps what that costs; changes nothing."""

    statistics = ("second_moment",)

    def __init__(
        self,
        model: nn.Module,
        candidates: Mapping[str, list[Candidate]],
        samples: Mapping[str, LayerSamples],
        calibration: Calibration,
    ) -> None:
        self.model, self.candidates, self.samples, self.calibration = model, candidates, samples, calibration
        self.found: dict[str, list[LayerChoice]] = {}

    def visit_group(self, group: InputGroup) -> None:
        hessian = group.hessian(self.calibration)
        for name in group.names:
            if name in self.samples:
                self.found[name] = self._measured(name, hessian)

    def _measured(self, name: str, hessian: Tensor | None) -> list[LayerChoice]:
        weight = dense_weight(self.model, name).detach()
        found = []
        for fields, spec, n_bytes in self.candidates[name]:
            method = get_method(spec.method)
            step = max(1, len(weight) // ROWS) if method.has_independent_rows else 1
            rows = slice(None, None, step)
            quantized = quantize_weight(weight[rows], spec, layer_name=name, hessian=hessian)
            with torch.no_grad():
                delta = method.dequantize(quantized) - weight[rows].float()
            found.append(LayerChoice(fields=fields, n_bytes=n_bytes, kl=self.samples[name].divergence(delta, rows)))
        return found
