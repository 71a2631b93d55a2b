"""Which types of dense module are quantized, and how each keeps its weight. One entry per type.

An entry is a plain value: a quantized layer keeps the entry of the module that it replaced, and can be pickled with
it. A type matches its exact class only, since a subclass may compute something else in ``forward``. Classes are named
by text and looked up among the loaded modules, so that this file imports no model.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

from .expert_types import dense_stacks, find_stack


def _from_sizes(module_type: type[nn.Module], out_features: int, in_features: int) -> nn.Module:
    return cast(Any, module_type)(in_features, out_features, bias=False)


def _from_turned_sizes(module_type: type[nn.Module], out_features: int, in_features: int) -> nn.Module:
    return cast(Any, module_type)(out_features, in_features)


@dataclass(frozen=True, kw_only=True)
class DenseType:
    """One type of dense module that computes ``x @ weight.T + bias``, with Parameters ``weight`` and ``bias``.

    Fields:
        path: the class, as ``"module:Class"``.
        is_transposed: the module keeps its weight as (in_features, out_features).
        create: makes an empty module of the class from (class, out_features, in_features).
    """

    path: str
    is_transposed: bool = False
    create: Callable[[type[nn.Module], int, int], nn.Module] = _from_sizes

    def is_type_of(self, module: nn.Module) -> bool:
        """Whether ``module`` is of this very class; False for its subclasses."""
        module_name, _, class_name = self.path.partition(":")
        return getattr(sys.modules.get(module_name), class_name, None) is type(module)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out_features, in_features) of ``module``, which is of this type."""
        first, second = cast(Tensor, module.weight).shape
        return (second, first) if self.is_transposed else (first, second)

    def weight(self, module: nn.Module) -> Tensor:
        """The weight as (out_features, in_features): the module's own tensor, or a view of it."""
        weight = cast(Tensor, module.weight)
        return weight.t() if self.is_transposed else weight

    def rebuild(self, weight: Tensor, bias: nn.Parameter | None, *, is_training: bool) -> nn.Module:
        """A dense module of this type around ``weight`` (out_features, in_features) and ``bias``, both not copied.

        A transposed type takes a contiguous copy of ``weight``. The weight does not train.
        """
        module_name, _, class_name = self.path.partition(":")
        module_type = getattr(import_module(module_name), class_name)
        with torch.device("meta"):  # nothing is initialised
            module = self.create(module_type, *weight.shape)
        stored = weight.detach().t().contiguous() if self.is_transposed else weight.detach()
        module.weight = nn.Parameter(stored, requires_grad=False)
        module.register_parameter("bias", bias)
        return module.train(is_training)


_dense_types: dict[str, DenseType] = {}


def register_dense_type(entry: DenseType) -> DenseType:
    """Make modules of the class ``entry.path`` quantizable, and return the entry.

    Raises:
        TypeError: no DenseType.
        ValueError: the class has another entry already, or ``path`` is not ``"module:Class"``.
    """
    if not isinstance(entry, DenseType):
        raise TypeError(f"register_dense_type takes a DenseType(path='module:Class'), got {type(entry).__name__}.")
    if not all(entry.path.partition(":")):
        raise ValueError(f"path={entry.path!r} must be 'module:Class', for example 'torch.nn.modules.linear:Linear'.")
    if _dense_types.setdefault(entry.path, entry) != entry:
        raise ValueError(f"{entry.path} is registered already, as {_dense_types[entry.path]}.")
    return entry


def dense_type_of(module: nn.Module) -> DenseType | None:
    """The entry of the class of ``module``; None where modules of this class are not quantized."""
    cls = type(module)
    entry = _dense_types.get(f"{cls.__module__}:{cls.__qualname__}")
    return entry if entry is not None and entry.is_type_of(module) else None


def dense_at(model: nn.Module, name: str) -> tuple[nn.Module, DenseType]:
    """The module ``name`` of ``model`` and the entry of its type.

    Raises:
        ValueError: the module is of a type that is not registered.
    """
    module = model.get_submodule(name)
    entry = dense_type_of(module)
    if entry is None:
        raise ValueError(
            f"{name}: a {type(module).__qualname__} is not a dense layer that can be quantized. If it computes "
            "x @ weight.T + bias, register its class with peft_quantlayers.layers.register_dense_type."
        )
    return module, entry


def dense_shape(model: nn.Module, name: str) -> tuple[int, ...]:
    """(out_features, in_features) of the dense module ``name``, (rows, embedding_dim) of a table, or (n_experts, ...)
    of the fused weight of that name; raises as :func:`dense_at`."""
    module, entry = find_stack(model, name) or _find_embedding(model, name) or dense_at(model, name)
    return entry.shape(module)


def dense_weight(model: nn.Module, name: str) -> Tensor:
    """The weight of the shape :func:`dense_shape`: the model's own tensor or a view; raises as :func:`dense_at`."""
    module, entry = find_stack(model, name) or _find_embedding(model, name) or dense_at(model, name)
    return entry.weight(module)


def _find_embedding(model: nn.Module, name: str) -> tuple[nn.Module, DenseType] | None:
    """The table ``name`` of ``model``, as an entry that gives its shape and its weight; or None."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return (module, _TABLE) if isinstance(module, nn.Embedding) else None


def dense_key(model: nn.Module, name: str) -> str:
    """The name of the parameter that :func:`dense_weight` gives, in the state of ``model``."""
    found = find_stack(model, name)
    is_parameter = found is not None and isinstance(getattr(found[0], found[1].parameter), nn.Parameter)
    return name if is_parameter else f"{name}.weight"


def dense_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of ``model`` of a registered type, by name."""
    return {name: module for name, module in model.named_modules() if dense_type_of(module) is not None}


def dense_names(model: nn.Module) -> list[str]:
    """Names of all that can be quantized: modules of a registered type, embedding tables, fused weights of experts."""
    tables = (name for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    return [*dense_modules(model), *tables, *(name for name, _, _ in dense_stacks(model))]


# Of embedding tables of any class; not registered, since they are no linear layers.
_TABLE = DenseType(path="torch.nn.modules.sparse:Embedding")
LINEAR = register_dense_type(DenseType(path="torch.nn.modules.linear:Linear"))
register_dense_type(DenseType(path="transformers.pytorch_utils:Conv1D", is_transposed=True, create=_from_turned_sizes))
# Subclasses of nn.Linear in transformers 5.23 that compute the same. tests/layers/test_dense_types.py lists all
# others, with the reason why each is left dense.
# ``input @ weight.T``, then ``+ bias``: in half precision one rounding more than nn.Linear.
register_dense_type(DenseType(path="transformers.models.falcon.modeling_falcon:FalconLinear"))
# Has no forward of its own. What it adds, ``init`` and ``init_fn``, is read by random initialisation only.
register_dense_type(DenseType(path="transformers.models.esm.modeling_esmfold:EsmFoldLinear"))
