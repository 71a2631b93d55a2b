"""The quantized layers that a checkpoint describes, with empty tensors, before those of its files are read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedModel

from ..formats import QuantSpec
from ..formats.checkpoint_format import ModelDescription
from ..layers import LowRankBranch, QuantizedLinear
from ..layers.dense_types import dense_shape, dense_weight
from ..layers.embedding_tables import place_empty_tables
from ..layers.replace import place_empty_layer
from ..layers.stack import QuantizedStack
from ..layers.stack_branch import StackBranch
from .private_transformers import kept_dtype


def tensor_names(model: PreTrainedModel, specs: Mapping[str, QuantSpec], branches: Collection[str]) -> set[str]:
    """All parameters of the layers ``specs``, those of their branches too, without biases.

    Raises:
        ValueError: a spec does not fit its layer; names it.
    """
    names = {f"{name}.branch.{part}" for name in branches for part in ("A", "B")}
    for name, spec in specs.items():
        try:
            names |= {f"{name}.{part}" for part in spec.layout_of(dense_shape(model, name))}
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return names


def place_described_layers(
    model: PreTrainedModel, description: ModelDescription, names: Mapping[str, str], specs: Mapping[str, QuantSpec]
) -> None:
    """Put quantized layers on the meta device, and their branches, in the place of the modules in ``names``.

    Args:
        model: whose modules are replaced.
        description: of the checkpoint.
        names: of the modules, by their names in the checkpoint.
        specs: of the modules.
    """
    dtypes = {
        name: description.compute_dtypes.get(stored_name, description.compute_dtype)
        or kept_dtype(model, name, dense_weight(model, name).dtype)
        for stored_name, name in names.items()
    }
    tables = place_empty_tables(model, specs, compute_dtypes=dtypes, device="meta")
    for stored_name, name in names.items():
        layer: Any = model.get_submodule(name) if name in tables else None
        if layer is None:
            layer = place_empty_layer(model, name, specs[name], compute_dtype=dtypes[name], device="meta")
        rank = description.branches.get(stored_name)
        if rank is not None and isinstance(layer, QuantizedStack):
            stack_shape = (layer.n_experts, layer.out_features, layer.in_features)
            layer.add_branch(StackBranch.empty_stack(rank, stack_shape, dtype=layer.compute_dtype, device="meta"))
        elif rank is not None and isinstance(layer, QuantizedLinear):
            shape = {"out_features": layer.out_features, "in_features": layer.in_features}
            layer.add_branch(LowRankBranch.empty(rank, **shape, dtype=layer.compute_dtype, device="meta"))
