"""``inspect FOLDER``: what a saved model or adapter holds, and whether it is as it was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from ...estimate import estimate_reading
from ...integrations.saved_folder import tensors_not_finite, verify_model
from ...report import summary
from .. import shared_options as options
from ..models import adapter_config, config_of, load_model, refuse_missing_folder, weight_bytes
from ..result import Result, not_finite_line

DESCRIPTION = "Say what a folder holds: bits of each layer, what stayed dense and why, adapters, damage."
POSITIONALS = ("model",)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument(
        "--model", type=str, required=True, help="folder of a model or an adapter, or a name on the Hub"
    )
    parser.add_argument("--layers", action="store_true", help="a line for every module")
    options.add_dry_run(parser)


def run(settings: Namespace) -> Result:
    """Read the folder and say what is in it."""
    refuse_missing_folder("model", settings.model)
    folder = Path(settings.model)
    if settings.dry_run:
        is_adapter = (folder / "adapter_config.json").is_file()
        adapter_config(settings.model) if is_adapter else config_of(settings.model)  # refuse what is none
        size = 0 if is_adapter else weight_bytes(settings.model)
        costs = estimate_reading("inspect", weights={settings.model: size})
        return Result(text=f"would read {settings.model}\n{costs}", data=costs.to_dict())
    damage, not_finite = _damage(folder), tensors_not_finite(folder)
    lines: list[str] = []
    if (folder / "adapter_config.json").is_file():
        lines, found = _adapter(folder)
    elif damage:  # loading would refuse it
        lines, found = [str(folder)], {}
    else:
        try:
            model = summary(load_model(settings.model))
        except ValueError:
            if not not_finite:
                raise
            lines, found = [str(folder)], {}
        else:
            lines = [model.table() if settings.layers else str(model)]
            found = {"class": model.model, "nbytes": model.nbytes, "fraction_quantized": model.fraction_quantized}
            found["modules"] = [_module(each) for each in model.modules]
    lines.append(_damage_line(damage))
    found["damaged"] = None if damage is None else [str(each) for each in damage]
    found["not_finite"] = not_finite
    lines += [not_finite_line(not_finite)] if not_finite else []
    return Result(text="\n".join(lines), data=found, exit_code=1 if damage or not_finite else 0)


def _damage(folder: Path) -> list[Any] | None:
    """Tensors that are not as they were saved; None where the files carry no checksums."""
    if not folder.is_dir():
        return None
    try:
        return verify_model(folder)
    except (ValueError, FileNotFoundError):
        return None


def _damage_line(damage: list[Any] | None) -> str:
    if damage is None:
        return "checksums: none in the files"
    if not damage:
        return "checksums: every tensor is as it was saved"
    first = str(damage[0]).rstrip(".")
    return f"checksums: {len(damage)} tensors are damaged, first {first}. Copy or download the files again."


def _adapter(folder: Path) -> tuple[list[str], dict[str, Any]]:
    config: Any = adapter_config(str(folder))
    fields = {name: getattr(config, name, None) for name in ("r", "lora_alpha", "target_modules", "target_parameters")}
    shown = {name: sorted(v) if isinstance(v, set) else v for name, v in fields.items() if v is not None}
    found = {"peft_type": str(config.peft_type.value), "base_model": config.base_model_name_or_path, **shown}
    lines = [f"adapter: {found['peft_type']} on {found['base_model']}"]
    lines += [f"  {name}: {json.dumps(value)}" for name, value in shown.items()]
    return lines, found


def _module(module: Any) -> dict[str, Any]:
    return {
        "name": module.name,
        "spec": None if module.spec is None else module.spec.to_dict(),
        "dense": module.reason,
        "n_parameters": module.n_parameters,
        "nbytes": module.nbytes,
        "bits_per_weight": module.bits_per_weight,
    }
