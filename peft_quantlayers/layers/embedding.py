"""Embedding tables whose rows are quantized. A lookup dequantizes the rows that it is asked for, and no others.

Which tables of a model they replace is in ``embedding_tables.py``. May import formats, methods and the kernels; never
PEFT or transformers.
"""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import QuantizedWeight, QuantSpec
from ..integrations.private_transformers import mark_as_initialized
from .changed_rows import with_changed_rows
from .placement import IN_ONE_PROCESS, check_weights_are_here
from .quantize_weight import quantize_weight
from .quantized_storage import QuantizedStorage
from .write_through import WriteThroughWeight, written_values


class QuantizedEmbedding(QuantizedStorage, nn.Embedding):
    """A table (num_embeddings, embedding_dim) of quantized rows; ``isinstance(layer, nn.Embedding)`` holds.

    ``weight`` is not stored. Reading it gives the dequantized table, and writing to it, by assignment or in place,
    quantizes the rows that were changed; all others keep their codes. A table with more or fewer rows may be assigned
    to it, as ``resize_token_embeddings`` does.

    A table of a subclass of ``nn.Embedding`` becomes a layer of a class that is a subclass of both
    (:func:`embedding_type`), so that what its ``forward`` does to the rows, such as Gemma's scale, is done here too.

    Attributes:
        spec: how the rows are stored; each has scales and zeros of its own.
        num_embeddings, out_features: rows of the table.
        embedding_dim, in_features: of a row.
        compute_dtype: of the rows that a lookup gives.
        layer_name: the module's name in its model, for messages.
        dense_class: of the table that was here.
        n_writes: how often the weight was written.
    """

    dense_class: type[nn.Embedding] = nn.Embedding
    branch: None = None  # as of the other layers, none of which is added to rows

    def __init__(
        self,
        quantized: QuantizedWeight,
        *,
        compute_dtype: torch.dtype,
        layer_name: str = "embedding",
        like: nn.Embedding | None = None,
    ) -> None:
        """``like``: the table in whose place this one is; its attributes and buffers are taken over."""
        nn.Module.__init__(self)
        if not quantized.has_rows_of_their_own:
            raise ValueError(
                f"{layer_name}: {quantized.spec} does not store each row by itself, as a lookup needs it."
            )
        self.padding_idx: int | None = None
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        if like is not None:
            _copy_attributes(like, self)
        self.spec = quantized.spec
        self.in_features = self.embedding_dim = quantized.in_features
        self.out_features = self.num_embeddings = quantized.out_features
        self.compute_dtype = compute_dtype
        self.layer_name = layer_name
        self._register_tensors(quantized, None)
        if not dict(self.named_buffers()):  # those, if they are not saved, are filled by transformers' initialisation
            mark_as_initialized(self)

    @staticmethod
    def from_embedding(table: nn.Embedding, spec: QuantSpec, *, layer_name: str = "embedding") -> QuantizedEmbedding:
        """Quantize ``table``, which is left as it is.

        Raises:
            ValueError: the shape does not fit ``spec``, ``spec`` does not store each row by itself, or the table holds
                NaN or Inf.
        """
        weight = table.weight.detach()
        quantized = quantize_weight(weight, spec, layer_name=layer_name)
        make = embedding_type(type(table))
        return make(quantized, compute_dtype=weight.dtype, layer_name=layer_name, like=table).train(table.training)

    # ---- weights

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense table, (num_embeddings, embedding_dim), in ``dtype`` (default: ``compute_dtype``)."""
        return self.method.dequantize(self._weight_of(self._tensors()), dtype=dtype or self.compute_dtype)

    dense_weight = dequantize

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, metadata included."""
        return self.quantized_weight.bits_per_weight

    def dense_table(self, dtype: torch.dtype | None = None, *, weight: Tensor | None = None) -> nn.Embedding:
        """The dense table that was here, with ``weight``, by default the dequantized one, which does not train."""
        table: nn.Embedding = self.dense_class.__new__(self.dense_class)
        nn.Module.__init__(table)
        _copy_attributes(self, table, without=_OWN_ATTRIBUTES)
        weight = self.dequantize(dtype) if weight is None else weight
        table.weight = nn.Parameter(weight.detach(), requires_grad=False)
        return table.train(self.training)

    def dense_with(self, weight: Tensor, bias: None = None) -> nn.Embedding:
        """:meth:`dense_table`, by the name that linear layers have for it."""
        return self.dense_table(weight=weight)

    def write_weight(self, weight: Tensor) -> None:
        """Quantize ``weight`` (n_rows, embedding_dim) into this layer; rows that are the same keep their codes.

        With another number of rows the table is resized, and with it every layer that shares its tensors.

        Raises:
            ValueError: another embedding_dim, NaN or Inf in ``weight``, or this process has not all codes of the
                layer, which is left as it was.
        """
        check_weights_are_here(self, f"{self.layer_name}: writing a weight", if_sharded=IN_ONE_PROCESS)
        if weight.dim() != 2 or weight.shape[1] != self.embedding_dim or not len(weight):
            raise ValueError(
                f"{self.layer_name}: cannot write a weight of shape {tuple(weight.shape)} into a table of shape "
                f"{(self.num_embeddings, self.embedding_dim)}."
            )
        # Inference tensors would forbid every later training step.
        with torch.inference_mode(False), torch.no_grad():
            weight = written_values(weight, self.codes.device)
            old = self.quantized_weight
            new = with_changed_rows(old, self.dequantize(), weight, layer_name=self.layer_name)
            if new is not old:
                self.resize(new)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.dequantize() if torch.compiler.is_compiling() else WriteThroughWeight(self)

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table: (...) integers to (..., embedding_dim), ``compute_dtype``.

        Raises:
            IndexError: an index below 0 or beyond the table.
        """
        rows = input.reshape(-1)
        if self.codes.is_meta and not rows.is_meta:
            raise RuntimeError(
                f"{self.layer_name}: its rows are on the meta device, without numbers. Load the weights first."
            )
        if not rows.numel():
            return torch.empty(*input.shape, self.in_features, dtype=self.compute_dtype, device=rows.device)
        found = self._weight_of(self._tensors()).take_rows(rows)
        return self.method.dequantize(found, dtype=self.compute_dtype).view(*input.shape, self.in_features)

    def reset_parameters(self) -> None:
        """Nothing: codes are never initialised at random."""

    def extra_repr(self) -> str:
        shown = [f"{name}={getattr(self.spec, name)}" for name in self.spec.shown_fields]
        return ", ".join([nn.Embedding.extra_repr(self), *shown])

    def _set_rows(self, n_rows: int) -> None:
        super()._set_rows(n_rows)
        self.num_embeddings = n_rows

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
        # Before nn.Module registers a Parameter of that name.
        elif not (isinstance(value, WriteThroughWeight) and value.is_held_by(self)):
            self.write_weight(value)

    def __reduce__(self) -> Any:
        """By the class of the dense table: that of the layer may have no name of its own."""
        return _new_layer, (self.dense_class,), self.__dict__


# By the class of the dense table.
_types: dict[Any, type[QuantizedEmbedding]] = {}


def embedding_type(dense_class: type[nn.Embedding]) -> type[QuantizedEmbedding]:
    """The layer class for tables of ``dense_class``: of both classes, whose ``super().forward`` is a lookup here."""
    if dense_class is nn.Embedding:
        return QuantizedEmbedding
    if dense_class in _types:
        return _types[dense_class]
    contents = {"dense_class": dense_class, "__module__": __name__, "__doc__": QuantizedEmbedding.__doc__}
    # What the layer is comes first, except for the forward of the table.
    contents |= {name: vars(QuantizedEmbedding)[name] for name in _NOT_OVERRIDDEN}
    bases = (dense_class, QuantizedEmbedding)
    _types[dense_class] = found = type(f"Quantized{dense_class.__name__}", bases, contents)
    return found


def why_not_quantizable(table: nn.Embedding) -> str:
    """Why a table stays dense whatever its shape, in a few words; empty if it is quantized.

    What its class does in ``forward`` is tried with a stand-in for the rows, on any device: it has to take
    them from ``nn.Embedding``, and may not read the whole table.
    """
    kind = type(table).__name__
    if table.max_norm is not None:
        return "max_norm writes to the rows in every lookup"
    if any(name != "weight" for name, _ in table.named_parameters()) or list(table.children()):
        return f"a {kind} has other parameters beside its rows"
    if type(table).forward is nn.Embedding.forward:
        return ""
    probe_type: Any = type(kind, (type(table), _Probe), {"weight": _Probe.weight})
    probe = probe_type.__new__(probe_type)
    nn.Module.__init__(probe)
    probe.rows, probe.n_lookups = table.weight.new_zeros(1, table.embedding_dim), 0
    _copy_attributes(table, probe)
    try:
        found = probe(torch.zeros(1, dtype=torch.long, device=table.weight.device))
    except Exception:  # whatever a class does with a table that is none
        found = None
    is_row = isinstance(found, Tensor) and found.shape == probe.rows.shape and probe.n_lookups == 1
    return "" if is_row else f"a {kind} reads more than the rows that it looks up"


class _Probe(nn.Embedding):
    """In the place of a table: gives rows, and of the whole table its dtype and device only."""

    rows: Tensor
    n_lookups: int

    def forward(self, input: Tensor) -> Tensor:
        self.n_lookups += 1
        return self.rows

    @property
    def weight(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(dtype=self.rows.dtype, device=self.rows.device)


def _copy_attributes(source: nn.Module, target: nn.Module, *, without: Collection[str] = ()) -> None:
    """The public attributes and the buffers of ``source`` for ``target`` as well, except those named and its hooks."""
    for name, value in vars(source).items():
        if not name.startswith("_") and name != "forward" and name not in without:
            setattr(target, name, value)
    saved = source.state_dict()
    for name, buffer in source.named_buffers(recurse=False):
        target.register_buffer(name, buffer, persistent=name in saved)


_OWN_ATTRIBUTES = {
    "spec", "in_features", "out_features", "compute_dtype", "layer_name", "n_writes", "sharing", "training",
}  # fmt: skip
_NOT_OVERRIDDEN = ("__init__", "__setattr__", "__reduce__", "weight", "reset_parameters", "extra_repr")


def _new_layer(dense_class: type[nn.Embedding]) -> QuantizedEmbedding:
    cls = embedding_type(dense_class)
    return cls.__new__(cls)
