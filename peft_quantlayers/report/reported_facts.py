"""All that a report says of a quantized model: each layer's facts, with errors where its float model is at hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from ..formats import QuantSpec
from ..integrations.float_checkpoint import FloatCheckpoint, local_folder
from ..layers.dense_types import dense_weight
from ..layers.quantize_weight import quantize_weight
from ..layers.quantized_layers import QuantizedLayer, layers_without_copies, replaced_parameters
from ..methods import get_method
from ..methods.hqq import HQQSpec
from .layer_facts import Choice, LayerFacts, errors, layer_facts
from .layer_inputs import LayerInputs, layer_inputs

# Of a layer that is quantized to see what more bits would give, where its rows do not depend on each other.
ROWS = 256
# The field that says how many bits a weight has, and its values from small to large.
LARGER = {"nbits": (2, 3, 4, 5, 6, 8), "num_codebooks": range(2, 9)}
N_CHOICES = 2
NO_QUANTIZED_LAYER = "the model holds no quantized layer: there is nothing to report on."


def model_facts(
    model: Any,
    *,
    float_model: str | Path | None = None,
    token_ids: Tensor | None = None,
    window: int = 512,
    n_worst: int = 10,
    progress: bool = True,
) -> list[LayerFacts]:
    """The facts of each quantized layer, in the order of the model, which is left as it is.

    Args:
        model: with quantized layers, in memory.
        float_model: what it was made of: a folder of safetensors, or a name on the Hub; None for facts without errors.
            One layer of it is in memory at a time.
        token_ids: a text, for the inputs of the layers and the errors of their outputs, (n_tokens,); None for none.
        window: tokens of it that are read together.
        n_worst: of how many layers, those with the largest errors, larger forms are tried.
        progress: show a bar.

    Raises:
        ValueError: no quantized layer, or ``float_model`` is none, or of another shape.
        FileNotFoundError: ``float_model`` does not exist.
    """
    layers = layers_without_copies(model)
    if not layers:
        raise ValueError(NO_QUANTIZED_LAYER)
    checkpoint = None if float_model is None else FloatCheckpoint(local_folder(float_model))
    inputs = {} if token_ids is None else layer_inputs(model, token_ids, window=window)
    bar = tqdm(layers.items(), desc="Layers", unit="layer", disable=not progress)
    found = {name: layer_facts(name, layer.quantized_weight) for name, layer in bar}
    for name, each in inputs.items():
        found[name].distributions["inputs"] = each.magnitudes
    if checkpoint is None:
        return list(found.values())
    for name, dense in _dense_weights(checkpoint, model, progress):
        rows = inputs[name].rows if name in inputs else None
        found[name].weight_error, found[name].output_error = errors(layers[name].quantized_weight, dense, rows)
    if all(each.error is None for each in found.values()):
        raise ValueError(f"{float_model} has none of the {len(found)} quantized layers: the model was not made of it.")
    worst = worst_layers(list(found.values()), n_worst)
    if worst:
        names = {facts.name for facts in worst}
        for name, dense in _dense_weights(checkpoint, model, progress, lambda each: each in names):
            found[name].choices = _choices(name, layers[name], dense, inputs.get(name))
    return list(found.values())


def worst_layers(facts: list[LayerFacts], n_layers: int) -> list[LayerFacts]:
    """The layers with the largest errors, the worst first; none where no error is known."""
    known = [each for each in facts if each.error is not None]
    return sorted(known, key=lambda each: -(each.error or 0.0))[:n_layers]


def _dense_weights(
    checkpoint: FloatCheckpoint, model: nn.Module, progress: bool, is_wanted: Callable[[str], bool] = lambda _: True
) -> Iterator[tuple[str, Tensor]]:
    """Name and float weight of each quantized layer, read one after the other."""
    names = {id(layer): name for name, layer in layers_without_copies(model).items()}
    wanted = {
        parameter: names[id(layer)]
        for parameter, layer in replaced_parameters(model).items()
        if id(layer) in names and is_wanted(names[id(layer)])
    }
    groups = [group for group in checkpoint.groups if wanted.keys() & set(group.parameters)]
    for group in tqdm(groups, desc="Float weights", unit="weight", disable=not progress):
        checkpoint.load([group])
        for parameter in wanted.keys() & set(group.parameters):
            name = wanted[parameter]
            weight = dense_weight(checkpoint.model, name)
            shape = quantized_shape(model, name)
            if tuple(weight.shape) != shape:
                raise ValueError(
                    f"{name} has the shape {tuple(weight.shape)} in {checkpoint.folder} and {shape} in the quantized "
                    "model: this is not the float model that it was made of."
                )
            yield name, weight
        checkpoint.release()


def quantized_shape(model: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of the weight that the quantized layer ``name`` stands for."""
    layer: Any = model.get_submodule(name)
    return layer.quantized_weight.shape


def _choices(name: str, layer: QuantizedLayer, dense: Tensor, inputs: LayerInputs | None) -> list[Choice]:
    """What the next larger forms of a layer give, each quantized without calibration."""
    found = []
    # Of a stack its first weight.
    weight = (dense[0] if layer.leading else dense).float().to(layer.codes.device)
    rows = None if inputs is None or layer.leading else inputs.rows
    for label, spec in larger_specs(layer.spec, *weight.shape):
        method = get_method(spec.method)
        step = max(1, len(weight) // ROWS) if method.has_independent_rows else 1
        quantized = quantize_weight(weight[::step], spec, layer_name=name)
        of_weight, of_outputs = errors(quantized, weight[::step], rows)
        _, bits = quantized.spec.bits_per_weight(*weight.shape)
        found.append(Choice(label=label, bits_per_weight=bits, error=of_weight if of_outputs is None else of_outputs))
    return found


def larger_specs(spec: QuantSpec, out_features: int, in_features: int) -> list[tuple[str, QuantSpec]]:
    """The next forms of a weight with more bits, and what differs in words: more bits a code, more codebooks, or HQQ
    where the method has one width."""
    field = next((name for name in LARGER if hasattr(spec, name)), None)
    base, field, prefix = (HQQSpec(), "nbits", "hqq ") if field is None else (spec, field, "")
    own = spec.bits_per_weight(out_features, in_features)
    found = []
    for number in LARGER[field]:
        changed: Any = {field: number}
        try:
            larger = dataclasses.replace(base, **changed)
            bits = larger.bits_per_weight(out_features, in_features)
        except ValueError:
            continue  # groups that do not divide this layer, or an export target that does not hold it
        if all(more > less for more, less in zip(bits, own, strict=True)):
            found.append((f"{prefix}{field}={number}", larger))
    return found[:N_CHOICES]


def mean_error(facts: list[LayerFacts]) -> float | None:
    """Root of the mean squared relative error, weighted by the layers' sizes; None where none is known."""
    known = [(each.error, each.n_weights) for each in facts if each.error is not None]
    if not known:
        return None
    return math.sqrt(sum(error**2 * n for error, n in known) / sum(n for _, n in known))
