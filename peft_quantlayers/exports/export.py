"""The call that users make: check everything, write all or nothing, say what came of it."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from ..integrations.interrupted_save import MODEL_FILES
from ..lora.base_fingerprint import AnotherBaseWarning
from ..storage import staged_folder
from .adapters import Adapter, another_base, branches_of, read_adapter
from .config_json import write_config
from .export_report import ExportReport
from .export_source import ModelSource
from .formats.format_base import Approximation, ExportFormat, ExportTask, LayerFacts, Written, facts_of
from .formats.format_registry import format_named
from .formats.grid_format import GridFormat
from .given_model import GivenModel, opened_model
from .kl_of_export import kl_of_export
from .refused_exports import Model, refuse_adapters, refuse_arguments, refuse_misfits
from .requantize import float_weights, refuse_another_float_model, requantized_layers, requantized_model
from .sharded_writer import SHARD_BYTES
from .side_files import REPORT, copy_side_files, has_chat_template, has_tokenizer, write_card
from .target_grid import target_spec
from .write_adapter import write_adapter

logger = logging.getLogger(__name__)


def export(
    model: nn.Module | str | Path,
    destination: str | Path,
    format: str,
    *,
    adapter: Any = None,
    dtype: torch.dtype | None = None,
    approximate: Approximation | None = None,
    tokenizer: Any = None,
    calibration: Any = None,
    float_model: nn.Module | None = None,
    text: Any = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a quantized model as an inference engine reads it, layer by layer, all of it or nothing.

    A format that holds the model's grid is written exactly. One that does not is refused before anything is written,
    unless ``approximate`` says what to do.

    Args:
        model: a transformers model with quantized layers, or the folder of one: saved by this package, a published
            HQQ or AQLM checkpoint, or a folder of the ``hqq`` package. A folder is not loaded.
        destination: must not exist, or be empty, unless ``overwrite``.
        format: a name in :func:`export_formats`.
        adapter: a folder with a LoRA adapter of PEFT (or a PeftModel), which is written beside the model in the form
            of the engine, and which the serving command loads.
        dtype: of dense tensors, scales and zeros; None for the model's, or float16 where bfloat16 would round zeros.
        approximate: how to store zeros that the format does not hold. ``"8bit"``: the same codes, 8 bits wide;
            ``"adapter"``: zeros rounded, and the rounding restored by a low-rank adapter, joined with ``adapter``;
            ``"requantize"``: the weights quantized again onto a grid of the format.
        tokenizer: a tokenizer, or its name or folder; None for the one in the model's folder.
        calibration: for ``"requantize"``: data as ``quantize_model`` takes it.
        float_model: for ``"requantize"``: the float model that this one was made from.
        text: token ids, or a text for the tokenizer, on which the export is compared with the model (KL). This loads
            the model.
        overwrite: replace the model in ``destination``.

    Returns:
        What was written, with the errors of each layer and the command that serves it. The same is in the folder, as
        ``export_report.json`` and in the model card.

    Raises:
        ValueError: an unknown format, or a model that the format cannot hold; names the layers and the ways out.
        NotImplementedError: an adapter that the engine does not read.
        ImportError: a package that writing needs is not installed; has the pip line.
        FileExistsError: ``destination`` holds files.
        FileNotFoundError: no model, adapter or tokenizer is there.
        TypeError: a value of the wrong type.
        OSError: no permission, or no space.
    """
    target = format_named(format)
    _check_destination(destination)
    has_data = calibration is not None or float_model is not None
    refuse_arguments(target, approximate=approximate, dtype=dtype, has_data=has_data)
    target.check_installation()
    with opened_model(model) as given:
        facts, tokenizer, tokenizer_folder = _checked(target, given, tokenizer, approximate)
        user_adapter, adapter_note = _read_adapter(adapter, given)
        _refuse_adapters(target, adapter, given)
        token_ids = _token_ids(text, tokenizer, tokenizer_folder)
        requantized = None
        if approximate == "requantize":
            requantized = _requantized(given, facts, target, calibration=calibration, float_model=float_model)
        with staged_folder(
            destination, MODEL_FILES, overwrite=overwrite, n_bytes=_bytes_to_write(target, given)
        ) as staged:
            with given.source(staged.parent) as source:
                task = ExportTask(
                    source=source,
                    folder=staged,
                    facts=facts if source.layers.keys() == facts.keys() else _facts(source),
                    dtype=dtype or target.dtype_for(source.dtype),
                    approximate=approximate,
                    requantized=requantized,
                    computed=None if token_ids is None else {},
                )
                copy_side_files(source.folder, staged, tokenizer=tokenizer, tokenizer_folder=tokenizer_folder)
                written = target.write(task)
                written.notes += [adapter_note] if adapter_note else []
                if source.tables and target.name != "dense":
                    tables = ", ".join(name.removesuffix(".weight") for name in source.tables)
                    written.notes.append(
                        f"Quantized embeddings are written dense, and a head that shares them too: {tables}."
                    )
                own = branches_of(source) if target.name != "dense" else {}
                adapter_name = _write_adapters(target, task, written, user_adapter, own)
            report = _report(target, task, written, Path(destination), adapter_name, user_adapter.rank)
            if token_ids is not None:
                kl = kl_of_export(given.loaded(), task.computed or {}, token_ids)
                report = replace(report, kl=kl)
            report = replace(report, n_bytes=sum(file.stat().st_size for file in staged.rglob("*") if file.is_file()))
            if written.config is not None:
                write_config(staged, written.config)
            report.save(staged / REPORT)
            write_card(staged, report, target)
    logger.info("%s", report)
    return report


def bytes_of_export(
    model: str | Path,
    destination: str | Path,
    format: str,
    *,
    adapter: Any = None,
    dtype: torch.dtype | None = None,
    approximate: Approximation | None = None,
    tokenizer: Any = None,
) -> tuple[int, int]:
    """About the bytes on disk that :func:`export` needs, and the numbers of the largest layer, which is in memory.

    Writes nothing. Arguments and errors are those of :func:`export`, but for the data.
    """
    target = format_named(format)
    _check_destination(destination)
    refuse_arguments(target, approximate=approximate, dtype=dtype, has_data=False)
    target.check_installation()
    with opened_model(model) as given:
        _checked(target, given, tokenizer, approximate)
        _read_adapter(adapter, given)
        _refuse_adapters(target, adapter, given)
        largest = max((layer.n_weights for layer in given.layers.values()), default=0)
        return _bytes_to_write(target, given), largest


def _checked(
    target: ExportFormat, given: GivenModel, tokenizer: Any, approximate: Approximation | None
) -> tuple[dict[str, LayerFacts], Any, Path | None]:
    """The facts of each layer, and the tokenizer as :func:`_tokenizer` has it; raises as :func:`export`."""
    facts = _facts(given)
    refuse_misfits(target, Model.of(given, facts), approximate)
    tokenizer, tokenizer_folder = _tokenizer(tokenizer, given)
    if target.needs_tokenizer and tokenizer is None and tokenizer_folder is None:
        raise FileNotFoundError(
            f"{target.name} files hold the tokenizer too, and there is none in the model's folder: pass "
            "tokenizer=AutoTokenizer.from_pretrained(name). Nothing was written."
        )
    return facts, tokenizer, tokenizer_folder


def _check_destination(destination: Any) -> None:
    if not isinstance(destination, (str, Path)):
        raise TypeError(f"destination must be a path, got {type(destination).__name__}. Nothing was written.")


def _refuse_adapters(target: ExportFormat, adapter: Any, given: GivenModel) -> None:
    has_branches = any(layer.branch is not None for layer in given.layers.values())
    refuse_adapters(target, has_adapter=adapter is not None, has_branches=has_branches)


def _bytes_to_write(target: ExportFormat, given: GivenModel) -> int:
    n_weights = sum(layer.n_weights for layer in given.layers.values())
    n_bytes = given.n_bytes + int(target.bytes_per_weight * n_weights)
    return n_bytes + min(n_bytes, SHARD_BYTES)  # tensors of one file wait in another one


def _facts(source: GivenModel | ModelSource) -> dict[str, LayerFacts]:
    return {name: facts_of(layer) for name, layer in source.layers.items()}


def _tokenizer(tokenizer: Any, given: GivenModel) -> tuple[Any, Path | None]:
    """A tokenizer to save, or the folder whose files are copied: loading and saving may leave out some of them."""
    if tokenizer is None:
        return None, next((each for each in given.folders if has_tokenizer(each)), None)
    if hasattr(tokenizer, "save_pretrained"):
        return tokenizer, None
    if isinstance(tokenizer, (str, Path)):
        folder = Path(tokenizer)
        return (None, folder) if has_tokenizer(folder) else (AutoTokenizer.from_pretrained(tokenizer), None)
    raise TypeError(f"tokenizer must be a tokenizer, or its name or folder, got {type(tokenizer).__name__}.")


def _token_ids(text: Any, tokenizer: Any, folder: Path | None) -> Tensor | None:
    if text is None or isinstance(text, Tensor):
        return text
    if not isinstance(text, str):
        raise TypeError(f"text must be a text or a tensor of token ids, got {type(text).__name__}.")
    tokenizer = tokenizer or (AutoTokenizer.from_pretrained(folder) if folder else None)
    if tokenizer is None:
        raise FileNotFoundError("text is measured in tokens, and the model has no tokenizer: pass tokenizer=.")
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


def _read_adapter(adapter: Any, given: GivenModel) -> tuple[Adapter, str]:
    """The adapter, and a note on the base that it was trained on."""
    if adapter is None:
        return Adapter(), ""
    if isinstance(adapter, (str, Path)):
        note = another_base(Path(adapter), given.modules, given.layers)
        if note:
            warnings.warn(note, AnotherBaseWarning, stacklevel=3)
        return read_adapter(Path(adapter), given.modules), note
    if not hasattr(adapter, "peft_config"):
        raise TypeError(f"adapter must be the folder of an adapter, or a PeftModel, got {type(adapter).__name__}.")
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_pretrained(folder)
        return _read_adapter(folder, given)


def _requantized(
    given: GivenModel, facts: Mapping[str, LayerFacts], target: ExportFormat, *, calibration: Any, float_model: Any
) -> Any:
    assert isinstance(target, GridFormat)
    if float_model is not None:
        refuse_another_float_model(given.layers, float_model)
    specs = {name: target_spec(each, target) for name, each in facts.items()}
    if calibration is not None:
        by_module = {given.layers[name].module: spec for name, spec in specs.items()}
        return requantized_model(given.loaded(), by_module, float_model=float_model, calibration=calibration)
    read = None if float_model is None else float_weights(float_model)
    return requantized_layers(given.layers, specs, read)


def _write_adapters(
    target: ExportFormat, task: ExportTask, written: Written, user: Adapter, branches: Mapping[str, Any]
) -> str | None:
    """Write all that goes beside the model as one adapter; its name below the folder, None if there is none."""
    user.add(branches)
    user.add(written.low_rank)
    if not user.factors:
        return None
    if user.rank > target.max_rank:
        raise ValueError(
            f"the adapter beside the model would have rank {user.rank}, and {target.engines[0]} takes "
            f'{target.max_rank} at most. Larger groups, approximate="8bit" or another format need none. Nothing was '
            "written."
        )
    assert target.adapter_form is not None  # others were refused
    return write_adapter(target.adapter_form, user, task, written)


def _report(
    target: ExportFormat, task: ExportTask, written: Written, destination: Path, adapter: str | None, rank: int
) -> ExportReport:
    notes = list(written.notes)
    folder = str(destination)
    if not has_chat_template(task.folder):
        notes.append("The model has no chat template: use the completion endpoint, or pass tokenizer= one that has.")
    return ExportReport(
        format=target.name,
        folder=folder,
        layers=tuple(written.layers),
        notes=tuple(notes),
        serving_command=target.serving_command(folder, adapter=f"{folder}/{adapter}" if adapter else None, rank=rank),
    )
