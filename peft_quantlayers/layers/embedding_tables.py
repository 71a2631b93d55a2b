"""Which embedding tables of a model are quantized, each together with all that shares its weight.

The model is asked for its input and its output embeddings, and so are the models inside it; no names are known here.
Positions and token types are no input embeddings, and stay dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ..formats import QuantizedWeight, QuantSpec
from ..integrations.private_transformers import kept_dtype, tied_weights, tying_shared_tensors
from ..methods import HQQConfig, HQQSpec, QuantConfig
from .dense_rules import SHARED, StaysDense, declared_embeddings
from .dense_types import DenseType, dense_type_of
from .embedding import QuantizedEmbedding, embedding_type, why_not_quantizable
from .linear import QuantizedLinear, layer_type
from .quantize_weight import quantize_weight
from .quantized_storage import QuantizedStorage

EMBEDDING = "embedding"
# Of a table whose row is a multiple of it.
GROUP_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Table:
    """An embedding table and all modules that share its weight; or an output head that shares it with none.

    Fields:
        names: of the modules; first the one under whose name the weight is in files.
        shape: (rows, embedding_dim).
        stays_dense: why none of them is quantized, or None.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    stays_dense: StaysDense | None = None


def table_spec(config: QuantConfig) -> QuantSpec | None:
    """How ``config`` has tables stored: each row by itself, in groups; None if they stay dense.

    On a grid of the config's ``export_target`` where that has one of so many bits, for a head of its own.
    """
    nbits, target = config.quantize_embeddings, getattr(config, "export_target", None)
    if nbits is None:
        return None
    if target is not None:
        with suppress(ValueError):
            return HQQConfig.for_export(target, nbits=nbits).spec_for("")
    return HQQSpec(nbits=nbits, group_size=GROUP_SIZE, axis=1)


def asked_specs(config: QuantConfig, name: str, *, is_table: bool, is_head: bool) -> list[QuantSpec]:
    """The specs that the layer ``name`` may have of ``config``, before they are fitted to its shape."""
    of_table = table_spec(config) if is_table or is_head else None
    found = [] if is_table else [config.spec_for(name)]
    return found if of_table is None else [*found, of_table]


def embedding_tables(model: nn.Module) -> list[Table]:
    """The tables of the input and output embeddings of ``model``, in its order, as far as they are dense."""
    inputs = {
        id(module) for module in declared_embeddings(model, "get_input_embeddings") if isinstance(module, nn.Embedding)
    }
    heads = {
        id(module)
        for module in declared_embeddings(model, "get_output_embeddings")
        if dense_type_of(module) is not None
    }
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for parameters in _weights(model):
        names = [name.rpartition(".")[0] for name in parameters]
        asked = [name for name in names if id(modules[name]) in inputs | heads]
        if not asked or any(isinstance(modules[name], QuantizedStorage) for name in names):
            continue
        shape = cast(Any, modules[asked[0]]).weight.shape
        reasons = [_why_dense(name, modules[name.rpartition(".")[0]]) for name in parameters]
        found.append(Table(names=tuple(names), shape=tuple(shape), stays_dense=next(filter(None, reasons), None)))
    return found


def _why_dense(parameter: str, module: nn.Module) -> StaysDense | None:
    """Why a weight that is shared with a table cannot be quantized, if it is the parameter ``parameter``."""
    if isinstance(module, nn.Embedding):
        detail = why_not_quantizable(module)
        return StaysDense(reason=EMBEDDING, detail=detail) if detail else None
    entry = dense_type_of(module)
    if entry is None or entry.is_transposed or not parameter.endswith(".weight"):
        return StaysDense(reason=SHARED, detail=f"{parameter} of a {type(module).__name__}")
    return None


def _weights(model: nn.Module) -> Iterator[list[str]]:
    """Names of the parameters of each weight of ``model`` that is a matrix: several where they share it.

    First the name that files have. Without numbers, on the meta device, what is declared as tied counts as shared.
    """
    sources = tied_weights(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    groups: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        source = parameters.get(sources.get(name, name))
        is_declared = source is not None and (source.is_meta or parameter.is_meta)
        key = id(source) if is_declared else id(parameter)
        if parameter.dim() == 2:
            groups.setdefault(key, []).append(name)
    for names in groups.values():
        yield sorted(names, key=lambda name: name in sources)


def quantize_table(
    model: nn.Module,
    table: Table,
    spec: QuantSpec,
    *,
    compute_dtype: str | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Replace all modules of ``table`` in ``model`` by quantized ones, which hold one copy of its rows.

    ``compute_dtype``: None for that of the weight. ``device``: where to quantize; None for where the table is.

    Raises:
        ValueError: the table holds NaN or Inf, or does not fit ``spec``.
    """
    weight = cast(Any, model.get_submodule(table.names[0])).weight.detach()
    given = weight if device is None else weight.to(device)
    quantized = quantize_weight(given, spec, layer_name=table.names[0]).to(weight.device)
    _replace(model, table, quantized, compute_dtypes=dict.fromkeys(table.names, compute_dtype))


def stored_tables(model: nn.Module, specs: Mapping[str, QuantSpec]) -> dict[str, str]:
    """Of each dense module of ``model`` that shares its weight with a table in ``specs``, and of that table itself,
    the name under which their tensors are in files."""
    found: dict[str, str] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for parameters in _weights(model):
        names = [name.rpartition(".")[0] for name in parameters]
        stored = [name for name in names if name in specs and isinstance(modules[name], nn.Embedding)]
        found |= dict.fromkeys(names, stored[0]) if stored else {}
    return found


def place_empty_tables(
    model: nn.Module,
    specs: Mapping[str, QuantSpec],
    *,
    compute_dtypes: Mapping[str, str | None],
    device: torch.device | str,
) -> dict[str, str]:
    """:func:`quantize_table` with uninitialised tensors, to load a checkpoint into, for all tables in ``specs``.

    ``compute_dtypes``: of single modules; None for that of the weight. Returns as :func:`stored_tables`.
    """
    stored = stored_tables(model, specs)
    for name in dict.fromkeys(stored.values()):
        names = tuple(each for each, source in stored.items() if source == name)
        table = Table(names=names, shape=tuple(cast(Any, model.get_submodule(name)).weight.shape))
        place_empty_table(model, table, specs[name], compute_dtypes=compute_dtypes, device=device)
    return stored


def place_empty_table(
    model: nn.Module,
    table: Table,
    spec: QuantSpec,
    *,
    compute_dtypes: Mapping[str, str | None],
    device: torch.device | str = "meta",
) -> None:
    """:func:`quantize_table` with uninitialised tensors."""
    _replace(model, table, QuantizedWeight.empty(spec, table.shape, device), compute_dtypes=compute_dtypes)


def _replace(
    model: nn.Module, table: Table, quantized: QuantizedWeight, *, compute_dtypes: Mapping[str, str | None]
) -> None:
    layers: dict[int, QuantizedEmbedding | QuantizedLinear] = {}
    for name in table.names:
        module: Any = model.get_submodule(name)
        if id(module) not in layers:  # one module may have two names
            layers[id(module)] = _layer_around(
                module, quantized, name, _compute_dtype(model, name, compute_dtypes.get(name))
            )
    first, *others = layers.values()
    with tying_shared_tensors(model):
        for name in table.names:
            model.set_submodule(name, layers[id(model.get_submodule(name))])
        if others:
            first.share_tensors(others)


def _layer_around(
    module: Any, quantized: QuantizedWeight, name: str, compute_dtype: torch.dtype
) -> QuantizedEmbedding | QuantizedLinear:
    layer: QuantizedEmbedding | QuantizedLinear
    about: dict[str, Any] = {"compute_dtype": compute_dtype, "layer_name": name}
    if isinstance(module, nn.Embedding):
        layer = embedding_type(type(module))(quantized, like=module, **about)
    else:
        entry = cast(DenseType, dense_type_of(module))
        layer = layer_type(quantized.spec.method)(quantized, dense_type=entry, **about)
        layer.register_parameter("bias", module.bias)
    return layer.train(module.training)


def _compute_dtype(model: nn.Module, name: str, wanted: str | None) -> torch.dtype:
    own: torch.dtype = cast(Any, model.get_submodule(name)).weight.dtype
    if wanted is None:
        return own
    return getattr(torch, kept_dtype(model, name, getattr(torch, wanted)) or wanted)
