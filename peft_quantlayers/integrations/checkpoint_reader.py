"""Reads the folder of a saved or published model tensor by tensor, without loading the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

from ..formats import QuantizedWeight
from ..formats.checkpoint import SENTINEL_SHAPE
from ..formats.known_formats import known_formats
from ..layers import QuantizedEmbedding, QuantizedLinear, QuantizedStack
from ..layers.quantized_layers import QuantizedLayer, quantized_embeddings, quantized_layers
from .checkpoint_headers import CheckpointFiles
from .saved_folder import weight_files
from .tensor_conversion import QuantizedTensors, StoredLayers
from .transformers_config import QuantlayersConfig
from .transformers_quantizer import QuantlayersHfQuantizer
from .wide_codes import WideCodes


@dataclass(frozen=True, kw_only=True)
class OpenedFolder:
    """A model in a folder, its headers checked and no tensor loaded.

    Fields:
        folder: where it is.
        config: the parsed config.json.
        skeleton: the model on the meta device, its quantized layers in their places, without numbers.
        files: the tensors.
        names: of each quantized layer, by its name in the model, the name that it has in the files.
        stored_layers: what turns the tensors of other layouts into those of the layers' specs.
        sentinels: names of tensors that are there for readers that do not know the format.
    """

    folder: Path
    config: dict[str, Any]
    skeleton: nn.Module
    files: CheckpointFiles
    names: dict[str, str]
    stored_layers: StoredLayers
    sentinels: frozenset[str] = frozenset()

    @property
    def layers(self) -> dict[str, QuantizedLinear | QuantizedStack]:
        """The quantized linear layers and stacks by their names in the files; on the meta device.

        Without those that share the tensors of an embedding table.
        """
        return {
            self.names[name]: layer
            for name, layer in quantized_layers(self.skeleton).items()
            if name in self.names and not isinstance(layer, QuantizedEmbedding)
        }

    @property
    def tables(self) -> dict[str, QuantizedEmbedding]:
        """The quantized embedding tables by their names in the files, which have one of those that are shared."""
        tables = quantized_embeddings(self.skeleton)
        return {self.names[name]: table for name, table in tables.items() if name in self.names}

    def layer_tensor(self, name: str, layer: QuantizedLayer, tensor_name: str) -> Tensor:
        """The tensor ``tensor_name`` of the layout of a layer, which the files call ``name``; on the CPU.

        Raises:
            ValueError: it cannot be converted.
        """
        stored = self.files.read(f"{name}.{tensor_name}")
        entry = self.stored_layers.layers.get(layer.layer_name)
        if entry is None or isinstance(entry, WideCodes) or tensor_name not in entry.tensor_names:
            return stored
        return entry.convert(tensor_name, stored)

    def weight(self, name: str, layer: QuantizedLayer) -> QuantizedWeight:
        """The weight of the layer or table, or all weights of the stack, ``name`` in the files, its values checked.

        Raises:
            ValueError: a value that no quantizer writes: the file is damaged.
        """
        shape = {"out_features": layer.out_features, "in_features": layer.in_features}
        layout = layer.spec.tensor_layout(**shape)
        tensors = {tensor_name: self.layer_tensor(name, layer, tensor_name) for tensor_name in layout}
        weight = QuantizedWeight(spec=layer.spec, tensors=tensors, leading=layer.leading, **shape)
        weight.check(name)
        return weight


def open_folder(folder: Path) -> OpenedFolder:
    """The model in ``folder``: one that we saved, or a published HQQ or AQLM one, or a dense one.

    Raises:
        FileNotFoundError: no config.json or no safetensors files.
        ValueError: the files do not belong to the config, are damaged, or are of another quantization method.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: there is no model in it.")
    fields = json.loads((folder / "config.json").read_text())
    files = [str(file) for file in weight_files(folder)]
    quantization = fields.get("quantization_config")
    method = (quantization or {}).get("quant_method", "quantlayers")
    if quantization is not None and method not in known_formats():
        raise ValueError(
            f"{folder} is quantized with {method!r}, which is not read here; known are {sorted(known_formats())}. "
            "Dequantize it with the library that wrote it."
        )
    skeleton = _skeleton(folder, fields)
    stored = StoredLayers({}, failures=[])
    if quantization is None:
        opened = CheckpointFiles(files)
        return OpenedFolder(
            folder=folder, config=fields, skeleton=skeleton, files=opened, names={}, stored_layers=stored
        )
    quantizer = QuantlayersHfQuantizer(QuantlayersConfig.from_dict(quantization), pre_quantized=True)
    quantizer.preprocess_model(skeleton, checkpoint_files=files)
    opened = CheckpointFiles(files)
    keys = {parameter: key for key, parameter in quantizer.parameters.items()}
    names = {}
    for name, layer in quantized_layers(skeleton).items():
        key = keys.get(f"{name}.{layer.spec.codes_name}")
        if key is None and layer.sharing:
            continue
        if key is None:
            raise ValueError(
                f"{name}: {folder} holds each of these experts as quantized layers of its own, which are not read "
                "tensor by tensor. Load the model with from_pretrained, and pass the model."
            )
        names[name] = key.rpartition(".")[0]
    for entry in quantizer.quantized_tensors:
        stored = (entry.layers if isinstance(entry, QuantizedTensors) else None) or stored
    return OpenedFolder(
        folder=folder,
        config={name: value for name, value in fields.items() if name != "quantization_config"},
        skeleton=skeleton,
        files=opened,
        names=names,
        stored_layers=stored,
        sentinels=frozenset(
            key
            for key, header in opened.headers.items()
            if header.shape == SENTINEL_SHAPE and key not in quantizer.parameters
        ),
    )


def _skeleton(folder: Path, fields: dict[str, Any]) -> nn.Module:
    """The model of the config on the meta device, all dense."""
    architectures = fields.get("architectures") or [None]
    model_class = getattr(transformers, str(architectures[0]), None)
    if model_class is None:
        raise ValueError(
            f"{folder}/config.json names the architectures {architectures}, none of which this transformers "
            "has. Upgrade transformers, or load the model with its own code and pass the model."
        )
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return model_class(config)
