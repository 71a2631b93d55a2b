"""What all checkpoint formats share: the description of a quantized model, and what a format does with it.

A format is about the ``quantization_config`` in ``config.json`` and the tensors that belong to it: it knows neither
models nor transformers. The list of all formats is in :mod:`.known_formats`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .quant_spec import QuantSpec

SpecFromDict = Callable[[Any], QuantSpec]
"""Makes the spec of the method that ``fields["method"]`` names; raises ValueError or TypeError on anything else."""


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """Shape and dtype of a tensor in a file; ``dtype`` is None for one that no layer has."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


class CheckpointTensors(Protocol):
    """The tensors of a checkpoint: their headers by name, and the values of single ones on request."""

    @property
    def headers(self) -> Mapping[str, TensorHeader]: ...

    def read(self, name: str) -> Tensor: ...


class StoredLayer(Protocol):
    """A layer whose tensors are stored in another layout than that of its spec."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out_features, in_features), for a stack with the number of experts before them."""

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The tensors that are converted: all of the spec's layout."""

    def convert(self, tensor_name: str, stored: Tensor) -> Tensor:
        """The tensor ``tensor_name`` of the spec's layout, from the stored tensor of the same name."""


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """A quantized model as a checkpoint describes it. Names are those of the modules, as the checkpoint spells them.

    Fields:
        specs: how each quantized layer is stored.
        compute_dtype: the layers' compute dtype where it is not the model's, as text.
        compute_dtypes: that of the layers that have another one than the rest.
        branches: rank of the low-rank branch of each layer that has one.
        dense_linears: modules that a reader of ``nn.Linear`` by type would take for quantized, and that are dense.
        lossy_in_model_dtype: layers whose scales or codebooks the model's dtype cannot hold.
        stored_layers: layers that are converted when they are read; all others are read as they are.
        stacks: those of ``specs`` that are fused weights of experts, one tensor of several weights.
        embeddings: those of ``specs`` that are embedding tables.
        has_sentinels: whether layers have a tensor that stops readers which do not know the format.
    """

    specs: Mapping[str, QuantSpec]
    compute_dtype: str | None = None
    compute_dtypes: Mapping[str, str] = field(default_factory=dict)
    branches: Mapping[str, int] = field(default_factory=dict)
    dense_linears: tuple[str, ...] = ()
    lossy_in_model_dtype: tuple[str, ...] = ()
    stored_layers: Mapping[str, StoredLayer] = field(default_factory=dict)
    stacks: Collection[str] = ()
    embeddings: Collection[str] = ()
    has_sentinels: bool = False


class CheckpointFormat(ABC):
    """One layout of quantized checkpoints. Stateless.

    Attributes:
        name: the ``quant_method`` in ``config.json``.
        setting_names: entries next to a layer's tensors that hold settings, and belong to no module.
    """

    name: ClassVar[str]
    setting_names: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def can_hold(self, description: ModelDescription) -> str | None:
        """None if a checkpoint of this format holds all of ``description``; otherwise the reason why not."""

    @abstractmethod
    def write(self, description: ModelDescription) -> dict[str, Any]:
        """The ``quantization_config``, JSON-able, of a model that this format :meth:`can_hold`."""

    @abstractmethod
    def read(
        self, fields: Mapping[str, Any], tensors: CheckpointTensors, *, spec_from_dict: SpecFromDict
    ) -> ModelDescription:
        """What ``fields``, a parsed ``quantization_config``, and the headers of ``tensors`` describe.

        Raises:
            ValueError: a wrong value, or a missing tensor; names the field or the layer.
            TypeError: a value of the wrong type.
        """
