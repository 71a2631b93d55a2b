"""A float checkpoint on a disk, read group by group into a model on the meta device, as ``from_pretrained`` reads it.

With ``tensor_groups.py`` all that knows how transformers turns the tensors of files into parameters, without loading
all of them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig, _get_dtype
from transformers.utils import ContextManagers
from transformers.utils import logging as transformers_logging

from ..formats.checksums import are_checksums_used
from ..layers.dense_types import dense_key, dense_names
from ..layers.quantized_storage import QuantizedStorage
from ..methods import QuantConfig
from .checkpoint_checksums import refuse_damage
from .checkpoint_headers import CheckpointFiles
from .private_transformers import mark_as_initialized
from .saved_folder import weight_files
from .tensor_groups import TensorGroup, check_shape, find_groups, find_tied, without_copies
from .transformers_quantizer import QuantlayersHfQuantizer
from .weight_operation import joined_failures

logger = logging.getLogger(__name__)


class FloatCheckpoint:
    """A model of floats in a folder, of which nothing is in memory but what was loaded last.

    Attributes:
        folder: where it is.
        model: the model on the meta device; :meth:`load` puts numbers into a part of it, :meth:`release` drops them.
        files: the tensors, read with plain reads: mapped files would stay resident.
        dtype: that ``from_pretrained`` loads it in.
        groups: all that the model takes from the files.
        unexpected: names in the files that the model has no place for.
        tied: parameters that the files have no tensor for, or the same numbers, to the one whose numbers they share.

    Raises:
        FileNotFoundError: no config.json or no safetensors files.
        ValueError: the model is quantized already, an adapter, of an unknown class, or its files lack a parameter.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype | str = "auto") -> None:
        self.folder = folder
        self._refuse_others()
        paths = [str(file) for file in weight_files(folder)]
        self.files = CheckpointFiles(paths, backend="pread")
        if are_checksums_used():
            refuse_damage(self.files.opened, name=str(folder))
        self._model_class = _known_class(folder)
        config = AutoConfig.from_pretrained(folder)
        self.config, self.dtype = _get_dtype(dtype, paths, config, None, None, True, None)
        self.model = self.new_model()
        found = find_groups(self.model, self.files, where=str(folder))
        self.unexpected, self.conversions = found.unexpected, found.conversions
        self.tied = find_tied(self.model, found.groups, self.files)
        self.model.all_tied_weights_keys = dict(self.tied)
        self.groups = without_copies(found.groups, self.tied)
        self._check_complete()
        self._warn_of_unexpected()

    def fingerprints(self) -> dict[str, list[int]]:
        """Of each file its size, the time of its last change in ns, and the CRC-32 of its header."""
        found = {}
        for path in map(Path, self.files.opened):
            status = path.stat()
            with path.open("rb") as opened:
                header = opened.read(int.from_bytes(opened.read(8), "little"))
            found[path.name] = [status.st_size, status.st_mtime_ns, zlib.crc32(header)]
        return found

    def new_model(self) -> PreTrainedModel:
        """The model on the meta device, all of it dense."""
        with ContextManagers(self._model_class.get_init_context(self.dtype, True, False, None)):
            return self._model_class(self.config).eval()

    def load(self, groups: Sequence[TensorGroup], quantizer: QuantlayersHfQuantizer | None = None) -> None:
        """Put the numbers of ``groups`` into the model, those of layers that ``quantizer`` knows quantized.

        Raises:
            ValueError: a tensor does not fit the model, or a layer cannot be quantized; names it.
        """
        slices = {key: self.files.slice(key) for group in groups for key in group.keys}
        options = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            hf_quantizer=quantizer or _Unquantized(),
            weight_mapping=get_model_conversion_mapping(self.model, None, quantizer),
        )
        with _without_progress_bars():
            info, _ = convert_and_load_state_dict_in_model(self.model, slices, options)
        if quantizer is not None:
            self._quantize_joined(quantizer)
            if quantizer.failures:
                raise ValueError(joined_failures(quantizer.failures))
        for name, reason in info.conversion_errors.items():
            raise ValueError(f"{self.folder}: {name} cannot be converted: {reason}")
        for name, stored, wanted in info.mismatched_keys:
            check_shape(str(self.folder), name, stored, wanted)

    def release(self, module: nn.Module | None = None) -> None:
        """Drop the numbers that files have of ``module``, of the whole model by default; others are computed once."""
        for each in (self.model if module is None else module).modules():
            if isinstance(each, QuantizedStorage):
                each.to("meta")
                continue
            for name, parameter in each.named_parameters(recurse=False):
                each.register_parameter(name, nn.Parameter(parameter.to("meta"), requires_grad=False))
            buffers = dict(each.named_buffers(recurse=False))
            for name in buffers.keys() & each.state_dict().keys() if buffers else ():
                each.register_buffer(name, buffers[name].to("meta"))

    def prepare_forward(self) -> None:
        """Fill the buffers that no file has (rotary frequencies, ...), so that loaded parts of the model run."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            mark_as_initialized(tensor)
        self.model._move_missing_keys_from_meta_to_device(set(), None, None, None)
        self.model._initialize_missing_keys(False)

    def tie(self) -> None:
        """Let tied parameters share the numbers of the one that was loaded; quantized ones do already."""
        known = dict(self.model.named_parameters(remove_duplicate=False))
        for target, source in self.tied.items():
            if not {target, source} <= known.keys():
                continue
            places = [name.rpartition(".") for name in (source, target)]
            parameters = [self.model.get_parameter(name) for name in (source, target)]
            loaded = next((parameter for parameter in parameters if not parameter.is_meta), None)
            for parent, _, name in places if loaded is not None else ():
                self.model.get_submodule(parent).register_parameter(name, loaded)

    def _quantize_joined(self, quantizer: QuantlayersHfQuantizer) -> None:
        """Quantize what transformers did not ask about: it asks for one weight of several that a conversion makes."""
        operation: Any = quantizer.get_quantize_ops()
        dense = set(dense_names(self.model))
        for name in quantizer.specs:
            key = dense_key(self.model, name)
            weight: Any = self.model.get_parameter(key) if name in dense else None
            if weight is not None and not weight.is_meta:
                operation.convert({key: weight}, full_layer_name=key, model=self.model)

    def _refuse_others(self) -> None:
        file = self.folder / "config.json"
        if (self.folder / "adapter_config.json").exists():
            raise ValueError(
                f"{self.folder} holds an adapter (adapter_config.json). Give the folder of a float model; to have the "
                "adapter in it, merge it into that first."
            )
        if not file.is_file():
            raise FileNotFoundError(f"{self.folder} holds no config.json: there is no model in it.")
        quantized = json.loads(file.read_text()).get("quantization_config")
        if quantized is not None:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise ValueError(
                f"{self.folder} is quantized already ({method}). Give the float model that it was made of."
            )

    def _warn_of_unexpected(self) -> None:
        ignored = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_unexpected or ()]
        left_out = [key for key in self.unexpected if not any(pattern.search(key) for pattern in ignored)]
        if left_out:
            logger.warning(
                "%s: a %s has no place for %d tensor(s), which are left out, for example %s.",
                self.folder,
                type(self.model).__name__,
                len(left_out),
                left_out[:3],
            )

    def _check_complete(self) -> None:
        found = {name for group in self.groups for name in group.parameters}
        found |= {source for target, source in self.tied.items() if target in found}
        found |= {target for target, source in self.tied.items() if source in found}
        ignored = set(self.model._keys_to_ignore_on_save or ())
        missing = [name for name in self.model.state_dict() if name not in found | ignored]
        if missing:
            raise ValueError(
                f"{self.folder} lacks {len(missing)} tensor(s) of a {type(self.model).__name__}, for example "
                f"{missing[:3]}: they would be random numbers. Load the model with from_pretrained, train or remove "
                "what is missing, save it, and give that folder."
            )


def local_folder(source: str | Path) -> Path:
    """The folder of a model: ``source`` itself, or where the model of that name on the hub has been downloaded to.

    Raises:
        FileNotFoundError: no folder, and no name on the hub, or the hub cannot be reached.
    """
    if os.path.isdir(source):
        return Path(source)
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{source} is no folder, and could not be loaded as a model of the hub either: {error}"
        ) from None


def package_versions() -> dict[str, str]:
    """Versions of what determines the bytes of a quantized model."""
    found = {"torch": torch.__version__, "transformers": transformers.__version__}
    with suppress(PackageNotFoundError):  # run from its sources
        found["peft_quantlayers"] = version("peft_quantlayers")
    return found


class _Unquantized:
    """In the place of a quantizer: transformers then reads the tensors one at a time, in this thread."""

    pre_quantized = False

    def param_needs_quantization(self, *_: Any, **__: Any) -> bool:
        return False


def new_quantizer(checkpoint: FloatCheckpoint, config: QuantConfig, specs: dict[str, Any]) -> QuantlayersHfQuantizer:
    """A quantizer for :meth:`FloatCheckpoint.load` that quantizes the layers ``specs``."""
    quantizer = QuantlayersHfQuantizer(config, pre_quantized=False)
    quantizer.specs = dict(specs)
    return quantizer


def model_class(architectures: Sequence[str] | None) -> type[PreTrainedModel] | None:
    """The class of transformers that a config names as its model's; None where it has none such."""
    found = getattr(transformers, str(next(iter(architectures or ()), None)), None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _known_class(folder: Path) -> type[PreTrainedModel]:
    names = json.loads((folder / "config.json").read_text()).get("architectures")
    found = model_class(names)
    if found is None:
        raise ValueError(
            f"{folder}/config.json names the architectures {names}, and this version of transformers has none such. "
            "Code that comes with a model is not run here: load it with trust_remote_code, and quantize it in memory."
        )
    return found


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers shows a bar for each call; ours counts all."""
    is_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if is_enabled:
            transformers_logging.enable_progress_bar()
