"""What is exported: a model in memory or in a folder, read layer by layer under the names that its files have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import QuantizedWeight, QuantSpec
from ..integrations.checkpoint_reader import OpenedFolder, open_folder
from ..layers import QuantizedLinear, quantized_modules
from ..layers.dense_types import dense_modules, dense_shape


@dataclass(frozen=True, kw_only=True)
class SourceLayer:
    """One quantized layer.

    Fields:
        name: of its module, as the files spell it.
        spec: how it is stored.
        out_features, in_features: of its weight.
        is_transposed: its architecture's module keeps the weight as (in_features, out_features).
        tensor: reads one tensor of its layout.
        weight: reads all of them.
        branch: reads A and B of its low-rank branch; None where it has none.
    """

    name: str
    spec: QuantSpec
    out_features: int
    in_features: int
    is_transposed: bool
    tensor: Callable[[str], Tensor]
    weight: Callable[[], QuantizedWeight]
    branch: Callable[[], tuple[Tensor, Tensor]] | None

    @property
    def n_weights(self) -> int:
        """Of the whole layer."""
        return self.out_features * self.in_features


class ModelSource:
    """A model in a folder.

    Attributes:
        folder: where it is.
        skeleton: the model on the meta device.
        config: the parsed config.json, without the quantization.
        layers: the quantized layers by name.
        dense_names: all other tensors.
    """

    def __init__(self, opened: OpenedFolder) -> None:
        self._opened = opened
        self.folder = opened.folder
        self.skeleton = opened.skeleton
        self.config: dict[str, Any] = opened.config
        self.layers = {name: _layer_of(opened, name, layer) for name, layer in opened.layers.items()}
        self.dense_names = [key for key in opened.files.headers if key not in _own_keys(opened)]

    @property
    def dtype(self) -> torch.dtype:
        """Of most of the dense numbers."""
        counts: dict[torch.dtype, int] = {}
        for name in self.dense_names:
            header = self._opened.files.headers[name]
            if header.dtype is not None and header.dtype.is_floating_point:
                counts[header.dtype] = counts.get(header.dtype, 0) + max(1, torch.Size(header.shape).numel())
        return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32

    @property
    def dense_linears(self) -> list[str]:
        """Names of the linear modules that are dense."""
        modules = self._opened.skeleton.named_modules()
        return [name for name, module in modules if isinstance(module, nn.Linear) and not _is_quantized(module)]

    @property
    def n_bytes(self) -> int:
        """Of all tensors in the files."""
        headers = self._opened.files.headers.values()
        return sum(torch.Size(each.shape).numel() * (each.dtype.itemsize if each.dtype else 8) for each in headers)

    def linear_modules(self) -> dict[str, tuple[str, tuple[int, int]]]:
        """As :func:`linear_modules`, of this model."""
        return linear_modules(self._opened.skeleton, self._opened.names)

    def dense(self, name: str) -> Tensor:
        """The tensor ``name``, one of :attr:`dense_names`, in the dtype of the file."""
        return self._opened.files.read(name)

    def dense_tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """All dense tensors, floating ones in ``dtype``.

        Raises:
            ValueError: ``dtype`` cannot hold a number; names the tensor.
        """
        for name in self.dense_names:
            yield name, cast(self.dense(name), dtype, name)


def folder_source(folder: Path) -> ModelSource:
    """The model in ``folder``; raises as :func:`..integrations.checkpoint_reader.open_folder`."""
    return ModelSource(open_folder(folder))


def layers_in_memory(model: nn.Module) -> dict[str, SourceLayer]:
    """The quantized layers of ``model``, under their names in it; files may have other names."""
    return {
        name: SourceLayer(
            name=name,
            spec=layer.spec,
            out_features=layer.out_features,
            in_features=layer.in_features,
            is_transposed=layer.is_conv1d,
            tensor=lambda part, layer=layer: layer.quantized_weight.tensors[part].cpu(),  # type: ignore[misc]
            weight=lambda layer=layer: layer.quantized_weight.to(torch.device("cpu")),  # type: ignore[misc]
            branch=None if layer.branch is None else lambda b=layer.branch: (b.A.data.cpu(), b.B.data.cpu()),  # type: ignore[misc]
        )
        for name, layer in quantized_modules(model).items()
    }


def linear_modules(model: nn.Module, names: Mapping[str, str]) -> dict[str, tuple[str, tuple[int, int]]]:
    """Name in the files, and (out_features, in_features), of each module that an adapter may be on.

    Args:
        model: with quantized and dense layers.
        names: in the files, of the modules that are called otherwise there.
    """
    found = {name: (layer.out_features, layer.in_features) for name, layer in quantized_modules(model).items()}
    found |= {name: dense_shape(model, name) for name in dense_modules(model)}
    return {name: (names.get(name, name), shape) for name, shape in found.items()}


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``tensor`` in ``dtype`` if it is floating; ValueError, naming it, where finite numbers become infinite."""
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    if not torch.isfinite(converted).all():
        raise ValueError(
            f"{name} holds numbers as large as {tensor.abs().max().item():.3g}, which {dtype} cannot. Export with "
            "dtype=torch.float32 or torch.bfloat16. Nothing was written."
        )
    return converted


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLinear)


def _layer_of(opened: OpenedFolder, name: str, layer: QuantizedLinear) -> SourceLayer:
    files = opened.files
    branch = None
    if layer.branch is not None:
        branch = lambda: (files.read(f"{name}.branch.A"), files.read(f"{name}.branch.B"))  # noqa: E731
    return SourceLayer(
        name=name,
        spec=layer.spec,
        out_features=layer.out_features,
        in_features=layer.in_features,
        is_transposed=layer.is_conv1d,
        tensor=lambda part: opened.layer_tensor(name, layer, part),
        weight=lambda: opened.weight(name, layer),
        branch=branch,
    )


def _own_keys(opened: OpenedFolder) -> set[str]:
    """Keys of the files that belong to quantized layers, their settings included, without biases."""
    prefixes = {*opened.names.values(), *(f"{name}.branch" for name in opened.names.values())}
    return {
        key for key in opened.files.headers if key.rpartition(".")[0] in prefixes and key.rpartition(".")[2] != "bias"
    }
