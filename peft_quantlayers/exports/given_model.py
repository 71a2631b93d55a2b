"""What a caller exports: a model in memory, which is saved first, or a folder, which is not loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..integrations.hqq_package_folder import WEIGHTS as HQQ_PACKAGE_FILE
from ..integrations.hqq_package_folder import load_hqq_folder
from ..integrations.private_transformers import name_or_path
from ..layers.placement import check_weights_are_here
from ..lora import has_adapters
from .export_source import ModelSource, folder_source, layers_in_memory, linear_modules
from .source_layer import SourceLayer


@dataclass(kw_only=True)
class GivenModel:
    """What the caller gave: a model in memory, or a folder.

    Fields:
        layers: the quantized layers.
        config: the parsed config.json.
        modules: name in the files, and (out_features, in_features), of each linear module.
        folders: where its tokenizer may be.
        n_bytes: about what writing takes.
        model: None for a folder.
    """

    layers: Mapping[str, SourceLayer]
    config: Mapping[str, Any]
    modules: Mapping[str, tuple[str, tuple[int, int]]]
    folders: Sequence[Path]
    n_bytes: int
    model: PreTrainedModel | None = None
    folder_source: ModelSource | None = None

    @contextmanager
    def source(self, scratch: Path) -> Iterator[ModelSource]:
        """The model in a folder; one in memory is saved below ``scratch`` for as long as this lasts."""
        if self.folder_source is not None:
            yield self.folder_source
            return
        assert self.model is not None
        folder = scratch / "source"
        try:
            self.model.save_pretrained(folder)
            yield folder_source(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def loaded(self) -> Any:
        """The model in memory."""
        if self.model is None:
            assert self.folder_source is not None
            self.model = AutoModelForCausalLM.from_pretrained(self.folder_source.folder)
        return self.model


@contextmanager
def opened_model(model: Any) -> Iterator[GivenModel]:
    """``model``, checked; raises as :func:`..export.export`."""
    if isinstance(model, (str, Path)):
        folder = Path(model)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is no folder: export reads local folders. From the Hub: "
                "huggingface_hub.snapshot_download(name). Nothing was written."
            )
        if (folder / HQQ_PACKAGE_FILE).is_file():
            model = load_hqq_folder(folder)
        else:
            source = folder_source(folder)
            yield GivenModel(
                layers=source.layers,
                config=source.config,
                modules=source.linear_modules(),
                folders=[folder],
                n_bytes=source.n_bytes,
                folder_source=source,
            )
            return
    _check_model(model)
    path = Path(name_or_path(model) or ".")
    yield GivenModel(
        layers=layers_in_memory(model),
        config=model.config.to_dict(),
        modules=linear_modules(model, {}),
        folders=[path] if path.is_dir() and name_or_path(model) else [],
        n_bytes=2 * sum(tensor.nbytes for tensor in model.state_dict().values()),
        model=model,
    )


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"export takes a model or the folder of one, got {type(model).__name__}.")
    if has_adapters(model):
        raise ValueError(
            "the model carries PEFT adapters; nothing was written. Merge them (peft_quantlayers.merge_back), or "
            "export the base and pass the adapter's folder as adapter=."
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"export takes transformers models, got {type(model).__name__}. Nothing was written.")
    check_weights_are_here(model, "exporting", if_sharded="Save it, and export the folder.")
