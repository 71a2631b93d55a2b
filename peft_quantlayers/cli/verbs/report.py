"""``report FOLDER``: one HTML page on a quantized model, a training run, a merge, or all of these in one folder."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from quantlayers_cli.options import PROGRAM

from ...estimate import estimate_reading
from ...integrations.saved_folder import tensors_not_finite
from ...report import summary
from ...report.html_page import folded, note, page, preformatted
from ...report.merge_parts import MERGE_FILE, merge_parts
from ...report.model_parts import model_parts
from ...report.reported_facts import NO_QUANTIZED_LAYER, mean_error, model_facts, worst_layers
from ...report.training_parts import ADAPTER_FILE, adapter_parts, find_trainer_state, training_parts
from ...storage import replace_file
from .. import shared_options as options
from ..given_exports import refuse_export
from ..given_tokenizers import check_ids, long_windows_refused, needed_tokenizer
from ..models import (
    check_readable,
    config_of,
    is_quantized_already,
    load_model,
    n_parameters,
    refuse_missing_folder,
    weight_bytes,
)
from ..parsing import VerbParser
from ..read_data import DATA_HELP, token_ids
from ..refused_values import check_at_least
from ..result import Result, not_finite_line

DESCRIPTION = (
    "Write one HTML page on what a folder holds: a quantized model (error of each layer, the worst layers and what "
    "more bits would buy, distributions, use of codes), a training run (its curves), a merge (what is retained)."
)
POSITIONALS = ("folder", "output")
PAGE = "report.html"
# Settings that verbs save beside what they write.
SETTINGS_OF = ("quantize", "train", "merge")


def add_arguments(parser: VerbParser) -> None:
    """Options of the verb."""
    parser.add_argument(
        "--folder", type=str, required=True, help="of a quantized model, a training run, or a merged model"
    )
    parser.add_argument("--output", type=str | None, default=None, help=f"file to write; null: {PAGE} in the folder")
    parser.add_argument(
        "--float_model",
        type=str | None,
        default=None,
        help="what the model was quantized from, for errors: folder or name; null: what its quantize.yaml names",
    )
    parser.add_argument(
        "--text", type=str | None, default=None, help=f"text for activations and errors of outputs: {DATA_HELP}"
    )
    parser.add_argument("--tokenizer", type=str | None, default=None, help="its folder or name; null: the model's")
    parser.add_argument("--n_tokens", type=int, default=4096, help="tokens of the text to use")
    parser.add_argument("--window", type=int, default=512, help="tokens that are read together")
    parser.add_argument("--n_worst", type=int, default=10, help="layers that are tried with more bits; 0: none")
    parser.add_argument(
        "--device", type=str | None, default=None, help="where to compute, such as cuda; null: the CPU"
    )
    options.add_dry_run(parser)


def run(settings: Namespace) -> Result:
    """Read the folder, write the page."""
    refuse_missing_folder("folder", settings.folder)
    refuse_missing_folder("float_model", settings.float_model or "")
    folder = Path(settings.folder)
    if not folder.is_dir():
        why = " is a file. Name the folder of a model, a training or a merge" if folder.exists() else None
        raise NotADirectoryError(f"--folder {folder}{why or ': there is no such folder'}.")
    refuse_export(settings.folder)
    if settings.float_model is not None:
        config_of(settings.float_model)
    check_at_least(settings, 2, "window")
    check_at_least(settings, 0, "n_worst")
    check_at_least(settings, 1, "n_tokens")
    file = Path(settings.output) if settings.output else folder / PAGE
    if file.is_dir():
        raise IsADirectoryError(f"--output {file} is a folder. Name a file, such as {file / PAGE}.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"--output {file}: there is no folder {file.parent}.")
    if file.exists() and file.suffix not in (".html", ".htm"):
        raise FileExistsError(f"--output {file} is there, and no page. Name a file that ends with .html.")
    options.check_place("output", file)
    _check_settings_file(file)
    if settings.dry_run:
        return planned(settings, folder, file)
    not_finite = tensors_not_finite(folder)
    parts: list[str] = [note(not_finite_line(not_finite))] if not_finite else []
    found: dict[str, object] = {"not_finite": not_finite}
    state = find_trainer_state(folder)
    if state is not None:
        parts += training_parts(state)
        found["training"] = str(state)
    if (folder / ADAPTER_FILE).is_file():
        check_readable(folder / ADAPTER_FILE)
    if of_adapter := adapter_parts(folder):
        parts += of_adapter
        found["adapter"] = str(folder / ADAPTER_FILE)
    if (folder / MERGE_FILE).is_file():
        parts += merge_parts(folder / MERGE_FILE)
        found["merge"] = str(folder / MERGE_FILE)
    if (folder / "config.json").is_file():
        model_part, found["model"] = _on_model(settings, folder)
        parts += model_part
    if not parts:
        raise _nothing_in(folder)
    parts += [folded(f"{verb}.yaml", preformatted(text)) for verb, text in _saved_settings(folder).items()]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    with replace_file(file) as part:
        text = page(folder.resolve().name, parts, footer=f"{PROGRAM} report {folder}; {versions}")
        part.write_text(text, encoding="utf-8")
    text = "\n".join([*([not_finite_line(not_finite)] if not_finite else []), f"wrote {file}"])
    return Result(
        text=text,
        data=found | {"page": str(file)},
        exit_code=1 if not_finite else 0,
        output=str(file.parent),
        settings_name=_settings_file(file).name,
    )


def planned(settings: Namespace, folder: Path, file: Path) -> Result:
    """What would be on the page, and what that takes."""
    contents: list[str] = []
    weights: dict[str, int] = {}
    n_tokens = 0
    if (state := find_trainer_state(folder)) is not None:
        contents.append(f"a training run: {state}")
    if (folder / ADAPTER_FILE).is_file():
        contents.append(f"an adapter: {folder / ADAPTER_FILE}")
    if (folder / MERGE_FILE).is_file():
        contents.append(f"a merge: {folder / MERGE_FILE}")
    if (folder / "config.json").is_file():
        if not is_quantized_already(settings.folder):
            raise ValueError(NO_QUANTIZED_LAYER)
        ids, float_model = _text_ids(settings), settings.float_model or _named_float_model(folder)
        n_tokens = 0 if ids is None else len(ids)
        weights = {settings.folder: weight_bytes(settings.folder)}
        contents.append("a model" + ("" if float_model is None else f", with its errors beside {float_model}"))
        contents[-1] += f", on {n_tokens:,} tokens" if n_tokens else ""
    if not contents:
        raise _nothing_in(folder)
    costs = estimate_reading(
        "report",
        weights=weights,
        n_parameters=n_parameters(settings.folder) if n_tokens else 0,
        n_tokens=n_tokens,
        notes=("without the time to try more bits on the worst layers",) if weights and settings.n_worst else (),
    )
    lines = [f"would write {file} on", *(f"  {each}" for each in contents), str(costs)]
    return Result(text="\n".join(lines), data=costs.to_dict())


def _nothing_in(folder: Path) -> ValueError:
    return ValueError(
        f"{folder} holds no model, no LoRA adapter, no {MERGE_FILE} and no state of a Trainer: there is nothing to "
        "report on."
    )


def _settings_file(file: Path) -> Path:
    """Where the settings of the page ``file`` are saved."""
    return file.with_suffix(".yaml")


def _check_settings_file(file: Path) -> None:
    """Raise FileExistsError where the settings of a page would replace another file."""
    beside = _settings_file(file)
    if beside.is_file() and not beside.read_text(errors="replace").startswith(f"# {PROGRAM} report "):
        raise FileExistsError(
            f"--output {file}: its settings go into {beside}, which is another file. Choose another name."
        )


def _text_ids(settings: Namespace) -> Any:
    """The tokens of ``--text``; None without one."""
    if settings.text is None:
        return None
    tokenizer = needed_tokenizer(settings.tokenizer or settings.folder)
    ids = token_ids("text", settings.text, tokenizer, n_tokens=settings.n_tokens)
    check_ids(ids, config_of(settings.folder))
    return ids


def _on_model(settings: Namespace, folder: Path) -> tuple[list[str], dict[str, object]]:
    ids = _text_ids(settings)
    float_model = settings.float_model or _named_float_model(folder)
    model = load_model(settings.folder, device=settings.device)
    with long_windows_refused(model, settings.window, option="window"):
        facts = model_facts(
            model, float_model=float_model, token_ids=ids, window=settings.window, n_worst=settings.n_worst
        )
    data = {
        "float_model": float_model,
        "mean_error": mean_error(facts),
        "worst": {each.name: each.error for each in worst_layers(facts, settings.n_worst)},
    }
    return model_parts(summary(model), facts, n_worst=settings.n_worst), data


def _named_float_model(folder: Path) -> str | None:
    """The model that ``quantize.yaml`` names, if it is a folder that is there. A merged model has another weight."""
    text = _saved_settings(folder).get("quantize")
    try:
        named = (yaml.safe_load(text) or {}).get("model") if text else None
    except (yaml.YAMLError, AttributeError) as error:
        raise ValueError(
            f"{folder / 'quantize.yaml'} holds no settings ({error}). Remove it, or name the model: --float_model "
            "FOLDER."
        ) from None
    return named if isinstance(named, str) and Path(named).is_dir() else None


def _saved_settings(folder: Path) -> dict[str, str]:
    files = {verb: folder / f"{verb}.yaml" for verb in SETTINGS_OF}
    return {verb: file.read_text(errors="replace") for verb, file in files.items() if file.is_file()}
