"""What of the options of ``train`` cannot work, said before anything is loaded or written; and what is no result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

from quantlayers_cli.option_names import WrongUsage

from ..arguments import nearest
from ..lora.base_fingerprint import base_fingerprints, layers_of_record
from . import shared_options as options
from .half_made import RESUME
from .models import config_of, is_quantized_already
from .refused_values import check_at_least, values_refused
from .same_run import plain, refuse_others
from .trained_adapter import OF_PEFT
from .trained_base import base_folder
from .trl_trainers import trainer_of

# The least that numbers of ``--training`` may be, where transformers takes less and fails later, or trains nothing.
LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "max_length": 2,
    "max_steps": -1,
    "learning_rate": 0,
    "max_grad_norm": 0,
    "neftune_noise_alpha": 0,
    "beta": 0,
}
# Numbers that must be above 0, steps also where they are a part of all.
POSITIVE = ("save_steps", "eval_steps", "num_train_epochs")
# Options of other packages' classes that have another default here.
OUR_DEFAULTS = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "report_to": "none", "use_cpu": True}
# Fields of an adapter's config that say how it began, or that saving fills in.
NOT_COMPARED = {*OF_PEFT, "init_lora_weights", "merge_aware", "quantized_base", "base_crc32"}
# Trackers that transformers does not list as available where they are.
NOT_LISTED = ("azure_ml", "flyte")


def check_training(settings: Namespace) -> None:
    """Raise an error where options contradict each other, the model or this machine; nothing was written.

    Raises:
        WrongUsage: a value out of range; options that exclude each other.
        ValueError: a model that cannot be trained here; a tracker that is not installed.
    """
    _check_numbers(settings)
    _check_places(settings)
    if settings.adapter_type == "lora" and settings.lora.task_type != "CAUSAL_LM":
        raise WrongUsage(
            f"--lora.task_type {settings.lora.task_type}: train finetunes language models. Leave it at CAUSAL_LM."
        )
    if settings.adapter_type != "lora" and settings.merge_aware:
        raise WrongUsage(f"--merge_aware true is for LoRA: leave it out, or --adapter_type {settings.adapter_type}.")
    if getattr(config_of(settings.model), "is_encoder_decoder", False):
        raise ValueError(
            f"{settings.model} is an encoder-decoder, and TRL's trainers take language models with a decoder only."
        )
    if settings.training.get("deepspeed"):
        raise WrongUsage(
            "--training.deepspeed flattens parameters into buffers of one floating dtype, of which the codes of "
            "quantized layers cannot be part. Leave it out, or shard the base over the processes: --fsdp_size N."
        )
    _check_trackers(settings.training.report_to)


def _check_numbers(settings: Namespace) -> None:
    training = vars(settings.training)
    for name, value in [*training.items(), *((f"lora.{key}", each) for key, each in vars(settings.lora).items())]:
        if isinstance(value, float) and math.isnan(value):
            raise WrongUsage(f"--{name if '.' in name else f'training.{name}'} {value} is no number.")
    check_at_least(settings, 1, "lora.r")
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (settings.lora[name] or {}).items():
            _check_value_of_pattern(name, pattern, value)
    check_at_least(settings, 0, "lora.lora_dropout", most=1)
    for name, least in LEAST.items():
        value = training.get(name)
        if isinstance(value, int | float) and not least <= value < math.inf:
            raise WrongUsage(f"--training.{name} {value:g} must be at least {least}.")
    for name in POSITIVE:
        value = training.get(name)
        if (
            isinstance(value, int | float)
            and value <= 0
            and not (name.startswith("num") and training["max_steps"] > 0)
        ):
            raise WrongUsage(f"--training.{name} {value:g} must be above 0.")
    if training["max_steps"] == 0:
        raise WrongUsage("--training.max_steps 0 trains nothing: at least 1, or -1 for --training.num_train_epochs.")


def _check_value_of_pattern(name: str, pattern: str, value: Any) -> None:
    """Raise WrongUsage for a value in PEFT's mappings of layers to ranks or alphas, whose types it does not check."""
    is_rank = name == "rank_pattern"
    is_number = isinstance(value, int if is_rank else int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or (is_rank and value < 1):
        wanted = "a whole number of at least 1" if is_rank else "a finite number"
        raise WrongUsage(f"--lora.{name} {{{pattern!r}: {value!r}}}: the value must be {wanted}.")


def _check_places(settings: Namespace) -> None:
    """Raise WrongUsage where two of the folders that are written are one, or one of them is that of the model."""
    places = {"output": Path(settings.output)}
    if not is_quantized_already(settings.model):
        places["base_output"] = base_folder(settings)
    for verb, option, inside in (("merge", "merged_output", "merged"), ("export", "export_output", "exported")):
        if settings[verb] is not None:
            places[option] = Path(settings[option] or places["output"] / inside)
    named: dict[Path, str] = {}
    for option, folder in places.items():
        options.check_output(
            settings, folder, option=option, is_adapter=option == "output" and settings.adapter_type != "pv"
        )
        if (other := named.setdefault(folder.resolve(), option)) != option:
            raise WrongUsage(f"--{other} and --{option} are one folder, {folder}. Give each its own.")


def _check_trackers(given: Any) -> None:
    """Raise ValueError for a tracker whose package is not installed. Unknown ones transformers names itself."""
    available = (*get_available_reporting_integrations(), *NOT_LISTED, "all", "none")
    for name in [given] if isinstance(given, str) else given or ():
        with values_refused():
            is_known = name in available or get_reporting_integration_callbacks([name])
        if is_known and name not in available:
            raise ValueError(
                f"--training.report_to {name}: the package is not installed. Install it, or leave this out: "
                "losses are in the output too."
            )


def check_modules_to_save(model: nn.Module, wanted_names: list[str] | None) -> None:
    """Raise ValueError for modules to train in full that the model does not have: PEFT would train none."""
    names = {name.rpartition(".")[2]: name for name, _ in model.named_modules()}
    for wanted in wanted_names or ():
        if not any(name == wanted or name.endswith(f".{wanted}") for name, _ in model.named_modules()):
            raise ValueError(f"--lora.modules_to_save {wanted}: the model has no such module{nearest(wanted, names)}.")


def check_something_is_learned(trainer: Any, **rows: Any) -> None:
    """Raise ValueError where TRL's trainer has dropped all rows: only their prompts are within the longest length.

    Args:
        trainer: its ``train_dataset`` and ``eval_dataset`` are what is left.
        rows: what it was given, by the option that named it (``data``, ``eval_data``).
    """
    for option, given in rows.items():
        left = trainer.train_dataset if option == "data" else trainer.eval_dataset
        if given is not None and len(given) and not len(left):
            end = "last" if trainer.args.truncation_mode == "keep_end" else "first"
            raise ValueError(
                f"--{option} leaves nothing to learn: in all of {len(given)} rows the completion lies outside the "
                f"{end} {trainer.args.max_length} tokens, to which rows are truncated. Raise --training.max_length."
            )


@contextmanager
def given_options_named(settings: Namespace) -> Iterator[None]:
    """Add the options that were given to an error of other packages that names none of them."""
    try:
        yield
    except Exception as error:
        given = _given(settings)
        said = str(error).lower().replace("_", " ")
        is_named = "--training." in str(error)
        if given and not is_named and not any(name.rpartition(".")[2].replace("_", " ") in said for name in given):
            error.add_note(f"Given were {', '.join(f'--{name} {value}' for name, value in given.items())}.")
        raise


def _given(settings: Namespace) -> dict[str, Any]:
    """Options of other packages' classes whose values are not the defaults, by name."""
    arguments_type, _ = trainer_of(settings.trainer)
    found: dict[str, Any] = {}
    groups: dict[str, Any] = {"training": arguments_type}
    if settings.adapter is None:  # else the adapter brings them
        groups["lora"] = LoraConfig
    for group, cls in groups.items():
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        for name, value in vars(settings[group]).items():
            is_default = str(value) == str(defaults.get(name)) or OUR_DEFAULTS.get(name, "") == value
            if not is_default and isinstance(value, str | int | float | list | dict) and defaults[name] is not MISSING:
                found[f"{group}.{name}"] = value
    return found


def check_checkpoint(checkpoint: str | None, *, is_adapter: bool) -> None:
    """Raise ValueError where ``checkpoint`` is the folder of a finished run, and not one of its checkpoints.

    Args:
        checkpoint: to go on with; None without one.
        is_adapter: whether an adapter is trained, and no model.
    """
    if checkpoint is None:
        return
    held, other = CONFIG_NAME, "config.json"
    if (Path(checkpoint) / (other if is_adapter else held)).is_file():
        kind, way = ("a model", "only --adapter_type pv") if is_adapter else ("an adapter", "only lora or scales")
        raise ValueError(f"--training.resume_from_checkpoint: {checkpoint} holds {kind}, which {way} goes on with.")
    if (Path(checkpoint) / (held if is_adapter else other)).is_file() and not Path(checkpoint).name.startswith(
        "checkpoint-"
    ):
        raise ValueError(
            f"--training.resume_from_checkpoint {checkpoint} is the output of a run, and no checkpoint, which also "
            f"holds the state of the optimizer. Give {checkpoint}/checkpoint-STEP, or go on there: --output "
            f"{checkpoint} {RESUME}."
        )


def check_base_of_checkpoint(model: nn.Module, checkpoint: str) -> None:
    """Raise ValueError where the adapter in ``checkpoint`` was trained on other codes than those of ``model``.

    Shards, as accelerate writes them with SHARDED_STATE_DICT, have no record of the base: they hold the base itself.
    """
    if not (Path(checkpoint) / CONFIG_NAME).is_file():
        return
    recorded, here = layers_of_record(PeftConfig.from_pretrained(checkpoint)), base_fingerprints(model)
    others = [name for name, print_ in recorded.items() if here.get(name, print_) != print_]
    if others or (recorded and not recorded.keys() & here.keys()):
        raise ValueError(
            f"--training.resume_from_checkpoint {checkpoint} was trained on another base: "
            f"{(others or list(recorded))[0]} is another one there, or none. Give its base, or leave it out."
        )


def check_adapter_of_checkpoint(model: PeftModel, checkpoint: str) -> None:
    """Raise WrongUsage where the adapter in ``checkpoint`` is of another form or scaling than that on ``model``."""
    if not (Path(checkpoint) / CONFIG_NAME).is_file():  # shards
        return
    saved, config = PeftConfig.from_pretrained(checkpoint), model.peft_config["default"]
    then, now = _compared(saved), _compared(config)
    group = "lora" if isinstance(config, LoraConfig) else "scales"
    others = {f"--{group}.{name}": (then[name], now[name]) for name in now if then.get(name, now[name]) != now[name]}
    if saved.peft_type != config.peft_type:
        kinds = ["lora" if isinstance(each, LoraConfig) else "scales" for each in (saved, config)]
        others = {"--adapter_type": (kinds[0], kinds[1])}
    if _are_names_of(getattr(saved, "target_modules", None), model.targeted_module_names):
        others.pop(f"--{group}.target_modules", None)
    refuse_others(checkpoint, others)


def _are_names_of(targets: Any, layers: list[str]) -> bool:
    """Whether the names or endings ``targets`` are those of ``layers``, and no others: "all-linear" is many."""
    if not isinstance(targets, set | list):
        return False
    found = {layer: {each for each in targets if f".{layer}".endswith(f".{each}")} for layer in layers}
    return all(found.values()) and set().union(*found.values()) == set(targets)


def _compared(config: PeftConfig) -> dict[str, Any]:
    """Fields of an adapter's config that a run keeps to, as JSON has them; names of modules sorted."""
    fields = plain(
        {
            name: value
            for name, value in config.to_dict().items()
            if name not in NOT_COMPARED and not name.endswith("_config")
        }
    )
    return {
        name: sorted(value) if name.endswith("_modules") and isinstance(value, list) else value
        for name, value in fields.items()
    }


def refuse_diverged(model: nn.Module, *, n_steps: int) -> None:
    """Raise ValueError if something that was trained is not finite any more: it is no result to save."""
    for name, parameter in model.named_parameters():
        here = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.requires_grad and not torch.isfinite(here).all():
            raise ValueError(
                f"the training diverged: {name} holds NaN or Inf after {n_steps} steps. Train with a lower "
                "--training.learning_rate, or with --training.max_grad_norm and --training.warmup_steps."
            )
