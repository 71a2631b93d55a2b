"""The settings that make the result of a training, kept in each of its checkpoints: a resumed run must have them too.

They are part of the Trainer's state, which is the last file of a checkpoint: no complete one is without them.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from enum import Enum
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from quantlayers_cli.option_names import WrongUsage

from ..report.training_parts import STATE_FILE
from . import shared_options as options
from .models import is_quantized_already
from .parsing import yaml_text

KEPT = ("model", "adapter", "tokenizer", "dtype", "data", "trainer", "adapter_type", "merge_aware")
# Of those, what may be a folder that was moved: the last part of its name counts. Codes are compared besides.
PLACES = ("model", "tokenizer", "training.chat_template_path")
# Options of ``--training`` that say how far it goes, where it is computed and what is told; all others are kept.
FREE = {
    *("max_steps", "num_train_epochs", "resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
    *("ignore_data_skip", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "do_eval"),
    *("do_predict", "do_train", "per_device_eval_batch_size", "prediction_loss_only", "batch_eval_metrics"),
    *("include_for_metrics", "include_num_input_tokens_seen", "skip_memory_metrics", "bf16_full_eval"),
    *("fp16_full_eval", "report_to", "run_name", "project", "push_to_hub", "disable_tqdm", "debug", "use_cpu", "tf32"),
    *("dataset_num_proc", "local_rank", "enable_jit_checkpoint", "full_determinism", "use_cache", "trust_remote_code"),
    *("use_liger_kernel", "liger_kernel_config", "label_names", "generate_during_eval"),
}
FREE_BEGINNINGS = (
    *("save_", "eval_", "logging_", "log_", "hub_", "trackio_", "dataloader_", "ddp_", "fsdp", "torch_"),
    *("activation_", "gradient_checkpointing"),
)
NOT_FREE = {"dataloader_drop_last"}
CHECKSUM = "data, CRC-32"
# Of a list, in a message.
SHOWN_ENTRIES = 8


class SettingsInState(TrainerCallback, ExportableState):
    """Has the Trainer keep ``settings``, of :func:`kept_settings`, in the state that it saves with a checkpoint."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the entry that the Trainer fills in, which the state in a checkpoint of an earlier version lacks."""
        entries: Any = state.stateful_callbacks
        entries.setdefault(type(self).__name__, self.state())

    def state(self) -> dict[str, Any]:
        """What is saved, as transformers reads it again."""
        return {"args": {"settings": self.settings}, "attributes": {}}


def is_resumed(settings: Namespace) -> bool:
    """Whether ``--training.resume_from_checkpoint`` asks to go on with a checkpoint, which may not be there."""
    return str(settings.training.resume_from_checkpoint).lower() not in ("none", "false")


def kept_settings(settings: Namespace) -> dict[str, Any]:
    """The options that make the result, by name, as JSON has them; and a checksum of the data where it is a file."""
    found = {name: settings[name] for name in KEPT}
    if not is_quantized_already(settings.model):
        found["quantization.method"] = settings.quantization.method
        config = options.method_config(settings.quantization)
        for field in dataclasses.fields(config):
            found[f"quantization.{field.name}"] = getattr(config, field.name)
    for group in (settings.adapter_type, "training"):
        for name, value in vars(settings[group]).items():
            is_free = name in FREE or (name.startswith(FREE_BEGINNINGS) and name not in NOT_FREE)
            if group != "training" or not is_free:
                found[f"{group}.{name}"] = value
    if Path(settings.data).expanduser().is_file():
        found[CHECKSUM] = file_checksum(Path(settings.data).expanduser())
    return plain(found)


def check_same_run(settings: Namespace, checkpoint: str | None) -> None:
    """Raise WrongUsage where the run of ``checkpoint`` had other settings that make the result.

    The optimizer's and the schedule's state would go on with some of the old values, and the model with the new ones.
    Checkpoints of versions that kept no settings are taken as they are.
    """
    kept = {} if checkpoint is None else _kept_in(Path(checkpoint))
    if not kept:
        return
    here = kept_settings(settings)
    if CHECKSUM in kept and CHECKSUM in here:  # of whatever name
        if kept.pop(CHECKSUM) == here.pop(CHECKSUM):
            kept.pop("data")
        elif kept["data"] == here["data"]:
            kept["data"] = f"{kept['data']} with other content"
    refuse_others(
        checkpoint,
        {f"--{name}": (kept[name], here[name]) for name in here if name in kept and not _is_same(name, kept, here)},
        is_model=settings.adapter_type == "pv",
    )


def refuse_others(checkpoint: str | None, others: dict[str, tuple[Any, Any]], *, is_model: bool = False) -> None:
    """Raise WrongUsage for options with another value than in the run of ``checkpoint``; (then, now) by name."""
    if others:
        told = "; ".join(f"{name} {_shown(then)}, and now {_shown(now)}" for name, (then, now) in others.items())
        raise WrongUsage(
            f"--training.resume_from_checkpoint: the run of {checkpoint} had other settings: {told}. Give the values "
            f"that it had; or begin a new run on what it has trained: --{'model' if is_model else 'adapter'} "
            f"{checkpoint}, and another --output."
        )


def plain(value: Any) -> Any:
    """``value`` as JSON gives it back."""
    return json.loads(json.dumps(value, default=_as_json))


def _as_json(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, Enum):
        return value.value
    return vars(value) if isinstance(value, Namespace) or dataclasses.is_dataclass(value) else str(value)


def _kept_in(checkpoint: Path) -> dict[str, Any]:
    state = json.loads((checkpoint / STATE_FILE).read_text())
    callbacks = state.get("stateful_callbacks") or {}
    found: dict[str, Any] = callbacks.get(SettingsInState.__name__, {}).get("args", {}).get("settings", {})
    return found


def _is_same(name: str, kept: dict[str, Any], here: dict[str, Any]) -> bool:
    then, now = kept[name], here[name]
    if name in PLACES and then and now:
        return Path(then).name == Path(now).name
    if name.endswith("target_modules") and isinstance(then, list) and isinstance(now, list):
        return sorted(then) == sorted(now)
    return bool(then == now)


def file_checksum(*files: Path) -> str:
    """The CRC-32 of what the files hold, one after the other, in hexadecimal digits."""
    checksum = 0
    for file in files:
        with file.open("rb") as stored:
            while block := stored.read(2**24):
                checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}"


def _shown(value: Any) -> str:
    if isinstance(value, list) and len(value) > SHOWN_ENTRIES:
        return f"[{', '.join(map(str, value[:2]))}, ... ({len(value)} in all)]"
    return yaml_text(value)
