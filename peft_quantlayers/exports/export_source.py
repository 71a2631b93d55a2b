"""What is exported: a model in memory or in a folder, read layer by layer under the names that its files have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import QuantizedWeight
from ..integrations.checkpoint_reader import OpenedFolder, open_folder
from ..integrations.expert_tensors import expert_tensors
from ..layers import QuantizedEmbedding, QuantizedLinear, QuantizedStack, quantized_modules
from ..layers.dense_types import dense_modules, dense_shape
from ..layers.expert_types import dense_stacks, fused_weights
from ..layers.quantized_layers import quantized_layers
from ..methods import HQQSpec, get_method
from .source_layer import SourceLayer, StackFacts


class ModelSource:
    """A model in a folder.

    Attributes:
        folder: where it is.
        skeleton: the model on the meta device.
        config: the parsed config.json, without the quantization.
        layers: the quantized layers by name.
        dense_names: all other tensors; quantized embeddings are among them, and are dequantized when they are read.
    """

    def __init__(self, opened: OpenedFolder) -> None:
        self._opened = opened
        self.folder = opened.folder
        self.skeleton = opened.skeleton
        self.config: dict[str, Any] = opened.config
        modules = {stored_name: name for name, stored_name in opened.names.items()}
        self.layers = {name: _layer_of(opened, name, modules[name], layer) for name, layer in opened.layers.items()}
        self.tables = {f"{name}.weight": (name, table) for name, table in opened.tables.items()}
        own = _own_keys(opened)
        self.dense_names = [*self.tables, *(key for key in opened.files.headers if key not in own)]

    @property
    def dtype(self) -> torch.dtype:
        """Of most of the dense numbers."""
        counts: dict[torch.dtype, int] = {}
        for _, table in self.tables.values():
            counts[table.compute_dtype] = counts.get(table.compute_dtype, 0) + table.weight.numel()
        for name in self.dense_names:
            if name in self.tables:
                continue
            header = self._opened.files.headers[name]
            if header.dtype is not None and header.dtype.is_floating_point:
                counts[header.dtype] = counts.get(header.dtype, 0) + max(1, torch.Size(header.shape).numel())
        return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32

    @property
    def dense_linears(self) -> list[str]:
        """Names of the linear modules that are dense, routers of experts included."""
        skeleton = self._opened.skeleton
        linears = [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)]
        dense = [name for name in linears if not _is_quantized(skeleton.get_submodule(name))]
        return [*dense, *(name for name in self._routers() if name not in linears)]

    def _routers(self) -> list[str]:
        """Names in the files of what engines take for linear modules beside experts; some are none in the model."""
        if not any(fused_weights(module) for module in self._opened.skeleton.modules()):
            return []
        headers = self._opened.files.headers
        dense = [name for name in self.dense_names if name not in self.tables]
        matrices = [name for name in dense if name.endswith(".weight") and len(headers[name].shape) == 2]
        embeddings = {"embed_tokens", "embeddings", "wte", "lm_head"}
        names = [name.removesuffix(".weight") for name in matrices if not re.search(r"\.experts\.\d+\.", name)]
        return [name for name in names if name.rpartition(".")[2] not in embeddings]

    @property
    def dense_experts(self) -> list[str]:
        """Names in the files of the modules of experts that are dense."""
        modules = []
        for name, _, _ in dense_stacks(self._opened.skeleton):
            keys = [tensor.key for tensor in expert_tensors(self._opened.skeleton, name)]
            found = re.match(r"(.*\.experts)\.", keys[0] if keys else name)
            modules.append(found[1] if found else name.rpartition(".")[0])
        return list(dict.fromkeys(modules))

    @property
    def n_bytes(self) -> int:
        """Of all tensors in the files."""
        headers = self._opened.files.headers.values()
        stored = sum(torch.Size(each.shape).numel() * (each.dtype.itemsize if each.dtype else 8) for each in headers)
        return stored + sum(table.weight.nbytes for _, table in self.tables.values())

    def linear_modules(self) -> dict[str, tuple[str, tuple[int, int]]]:
        """As :func:`linear_modules`, of this model."""
        return linear_modules(self._opened.skeleton, self._opened.names)

    def dense(self, name: str) -> Tensor:
        """The tensor ``name``, one of :attr:`dense_names`, in the dtype of the file, or in which a table computes.

        Raises:
            ValueError: a table is damaged.
        """
        if name in self.tables:
            stored_name, table = self.tables[name]
            weight = self._opened.weight(stored_name, table)
            return get_method(weight.spec.method).dequantize(weight, dtype=table.compute_dtype)
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
    """The quantized layers of ``model``, under their names in it; files may have other names.

    Without embedding tables and what shares their tensors, which are written dense.
    """
    return {
        name: SourceLayer(
            name=name,
            module=name,
            **_common(model, layer),
            stack=_stack_facts(model, name, layer) if isinstance(layer, QuantizedStack) else None,
            tensor=lambda part, layer=layer: _plain(layer.quantized_weight).tensors[part].cpu(),  # type: ignore[misc]
            weight=lambda layer=layer: _plain(layer.quantized_weight.to(torch.device("cpu"))),  # type: ignore[misc]
            branch=None if layer.branch is None else lambda b=layer.branch: (b.A.data.cpu(), b.B.data.cpu()),  # type: ignore[misc]
        )
        for name, layer in quantized_layers(model).items()
        if not isinstance(layer, QuantizedEmbedding) and not layer.sharing
    }


def linear_modules(model: nn.Module, names: Mapping[str, str]) -> dict[str, tuple[str, tuple[int, int]]]:
    """Name in the files, and (out_features, in_features), of each module that an adapter may be on.

    Args:
        model: with quantized and dense layers.
        names: in the files, of the modules that are called otherwise there.
    """
    found = {name: (layer.out_features, layer.in_features) for name, layer in quantized_modules(model).items()}
    for name in dense_modules(model):
        *leading, out_features, in_features = dense_shape(model, name)
        if not leading:  # experts in one tensor are no linear modules
            found[name] = (out_features, in_features)
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
    return isinstance(module, QuantizedLinear) and not module.sharing


def _common(model: nn.Module, layer: QuantizedLinear | QuantizedStack) -> dict[str, Any]:
    return {
        "model_type": str(getattr(getattr(model, "config", None), "model_type", "")),
        "spec": layer.spec.with_plain_metadata() if isinstance(layer.spec, HQQSpec) else layer.spec,
        "out_features": layer.out_features,
        "in_features": layer.in_features,
        "is_transposed": layer.is_transposed if isinstance(layer, QuantizedStack) else layer.is_conv1d,
    }


def _plain(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight without metadata in 8 bits, which no format of other engines has; to the bit."""
    return get_method(weight.spec.method).with_plain_metadata(weight)


def _stack_facts(model: nn.Module, name: str, stack: QuantizedStack) -> StackFacts:
    parent, _, parameter = name.rpartition(".")
    experts = model.get_submodule(parent)
    return StackFacts(
        n_experts=stack.n_experts,
        parameter=parameter,
        has_gate=parameter == "gate_up_proj",
        is_interleaved=not vars(experts).get("is_concatenated", True),
        tensors=expert_tensors(model, name),
        has_branch=stack.branch is not None,
    )


def _layer_of(opened: OpenedFolder, name: str, module: str, layer: QuantizedLinear | QuantizedStack) -> SourceLayer:
    files = opened.files
    branch = None
    if layer.branch is not None:
        branch = lambda: (files.read(f"{name}.branch.A"), files.read(f"{name}.branch.B"))  # noqa: E731
    return SourceLayer(
        name=name,
        module=module,
        **_common(opened.skeleton, layer),
        stack=_stack_facts(opened.skeleton, module, layer) if isinstance(layer, QuantizedStack) else None,
        tensor=(lambda part: _plain(opened.weight(name, layer)).tensors[part])
        if getattr(layer.spec, "double_quant", False)
        else (lambda part: opened.layer_tensor(name, layer, part)),
        weight=lambda: _plain(opened.weight(name, layer)),
        branch=branch,
    )


def _own_keys(opened: OpenedFolder) -> set[str]:
    """Keys of the files that belong to quantized layers, their settings and sentinels included, without biases."""
    prefixes = {*opened.names.values(), *(f"{name}.branch" for name in opened.names.values())}
    own = {
        key for key in opened.files.headers if key.rpartition(".")[0] in prefixes and key.rpartition(".")[2] != "bias"
    }
    return own | opened.sentinels
