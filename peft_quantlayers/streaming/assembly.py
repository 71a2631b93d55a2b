"""The files of the model, put together from finished parts: weights, index, config, card, and what is copied."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from ..formats.checkpoint import QUANT_METHOD
from ..formats.checksums import are_checksums_used, to_metadata
from ..formats.safetensors_file import StoredTensor, write_safetensors
from ..integrations.saved_folder import check_readable
from ..integrations.written_tensors import config_text, quantized_config
from ..saving import model_card
from ..storage import replace_file
from ..storage.other_files import CARD, copy_other_files, joined_card
from .checkpoint_parts import PartsOfModel
from .work_folder import WorkFolder

RUN_FILE = "quantlayers_run.json"
"""In the finished folder: the config, the source, and the versions that made it."""
_PLAN = "plan.json"


class Assembly:
    """Writes the files of the model once all parts are there; may be interrupted and called again at any point."""

    def __init__(self, work: WorkFolder, parts: PartsOfModel, *, max_shard_size: int | str) -> None:
        self.work, self.parts, self.max_shard_size = work, parts, max_shard_size

    @property
    def is_planned(self) -> bool:
        """Whether all parts were finished by an earlier call; some may be in their place and gone by now."""
        return self.work.read_json(_PLAN) is not None

    def write(self, target: Path, run: Mapping[str, Any]) -> None:
        """Write everything, and move it to ``target``."""
        if not self.work.is_ready:
            plan = self.work.read_json(_PLAN)
            if plan is None:
                plan = self._plan()
                self.work.write_json(_PLAN, plan)
            self.parts.restore(
                {name: about for name, about in plan["layers"].items() if name not in self.parts.layers}
            )
            self.work.new.mkdir(exist_ok=True)
            self._write_shards(plan)
            self._write_others(plan, run)
            check_readable(self.work.new, self.parts.checkpoint.model)
        self.work.publish(target, last="config.json")

    def _plan(self) -> dict[str, Any]:
        """Which tensor goes into which file and lies in which part, and all checksums."""
        model = self.parts.checkpoint.model
        config = quantized_config(model, self.parts.layers)
        has_sentinels = config.checkpoint_format.name == QUANT_METHOD
        n_parts = len(self.parts.parts)
        if has_sentinels:
            self.work.keep(n_parts, self.parts.written.sentinels(model), {})
            n_parts += 1
        part_of: dict[str, int] = {}
        stored: dict[str, StoredTensor] = {}
        checksums: dict[str, str] = {}
        for part in range(n_parts):
            found = self.work.stored(part)
            stored |= found
            part_of |= dict.fromkeys(found, part)
            checksums |= self.work.record(part)["checksums"]
        names = self.parts.written.names(has_sentinels=has_sentinels)
        if set(names) != set(stored):
            differing = sorted(set(names) ^ set(stored))
            raise RuntimeError(f"the parts do not hold what the model has, for example {differing[:3]}.")
        sizes = {
            name: torch.empty(stored[name].shape, dtype=stored[name].torch_dtype, device="meta") for name in names
        }
        split = split_torch_state_dict_into_shards(
            sizes, filename_pattern="model{suffix}.safetensors", max_shard_size=self.max_shard_size
        )
        return {
            "layers": self.parts.layers,
            "shards": split.filename_to_tensors,
            "total_size": split.metadata["total_size"],
            "tensors": {name: [part_of[name], entry.dtype, entry.shape] for name, entry in stored.items()},
            "checksums": {name: checksums[name] for name in names},
        }

    def _write_shards(self, plan: Mapping[str, Any]) -> None:
        """The safetensors files that are not there yet. A part goes as soon as all its tensors are in their files."""
        tensors, checksums = plan["tensors"], plan["checksums"]
        checked = to_metadata(checksums) if are_checksums_used() else {}
        last_shard = {tensors[name][0]: shard for shard, names in plan["shards"].items() for name in names}

        def read(name: str) -> Tensor:
            return self.work.read(tensors[name][0], name, checksums[name])

        for shard, names in plan["shards"].items():
            file = self.work.new / shard
            if not file.exists():
                stored = {name: StoredTensor(tensors[name][1], tuple(tensors[name][2])) for name in names}
                with replace_file(file) as part:
                    write_safetensors(part, stored, read, metadata={"format": "pt"} | checked)
            for number, last in last_shard.items():
                if last == shard:
                    self.work.drop(number)
        if len(plan["shards"]) > 1:
            index = {
                "metadata": {
                    "total_parameters": self.parts.checkpoint.model.num_parameters(),
                    "total_size": plan["total_size"],
                },
                "weight_map": {name: shard for shard, names in plan["shards"].items() for name in names},
            }
            self._write_text("model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _write_others(self, plan: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        model, source = self.parts.checkpoint.model, self.parts.checkpoint.folder
        copy_other_files(source, self.work.new)
        config = quantized_config(model, plan["layers"])
        self._write_text("config.json", config_text(model, config))
        self._write_text(RUN_FILE, json.dumps(run, indent=2, sort_keys=True) + "\n")
        self._write_text(CARD, joined_card(model_card(model), source))

    def _write_text(self, name: str, text: str) -> None:
        with replace_file(self.work.new / name) as part:
            part.write_text(text, encoding="utf-8")
