"""The state of an unfinished end-to-end tuning, stored so that the same call goes on from there."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..calibration.model_calls import batch_tensors
from ..calibration.trained_metadata import TrainedMetadata
from ..formats.quantized_weight import stored_bytes
from ..layers import QuantizedLinear
from ..storage import replace_file
from .predictions import Predictions

# Between two savings of an unfinished run.
SAVE_SECONDS = 120.0
STATE_FILE = "tune_scales.safetensors"


def fingerprint(layers: Sequence[QuantizedLinear], predictions: Predictions, options: dict[str, Any]) -> str:
    """A digest of all that determines the result."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    weights = [tensor for layer in layers for tensor in layer.quantized_weight.tensors.values()]
    for tensor in (*weights, *batch_tensors(predictions.batches), *predictions.log_probs):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(stored_bytes(tensor.contiguous().reshape(-1)))
    return digest.hexdigest()


class TuningState:
    """The state of an unfinished run in a file of ``folder``.

    Raises:
        ValueError: the file is damaged, or of another run, which ``run`` tells.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.file, self.run, self.saved_at = folder / STATE_FILE, run, time.monotonic()
        self._tensors: dict[str, Tensor] = {}
        self._step = 0
        if self.file.exists():
            self._read()

    def restore(self, trained: TrainedMetadata, optimizer: torch.optim.Adam) -> int:
        """Put what was stored in its place; the number of steps that were made, 0 without a file."""
        for number, parameter in enumerate(trained.parameters if self._step else ()):
            parameter.data.copy_(self._tensors[f"{number}.value"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(self._step)),
                "exp_avg": self._tensors[f"{number}.exp_avg"].to(parameter.device),
                "exp_avg_sq": self._tensors[f"{number}.exp_avg_sq"].to(parameter.device),
            }
        return self._step

    def keep_sometimes(self, trained: TrainedMetadata, optimizer: torch.optim.Adam, step: int) -> None:
        """Store the state after ``step`` steps, if it was not stored lately."""
        if time.monotonic() - self.saved_at < SAVE_SECONDS:
            return
        tensors = {}
        for number, parameter in enumerate(trained.parameters):
            tensors[f"{number}.value"] = parameter.data
            for name in ("exp_avg", "exp_avg_sq"):
                tensors[f"{number}.{name}"] = optimizer.state[parameter][name]
        with replace_file(self.file) as part:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                part,
                metadata={"run": self.run, "step": str(step)},
            )
        self.saved_at = time.monotonic()

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)

    def _read(self) -> None:
        try:
            with safe_open(self.file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                self._tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.file} is damaged ({error}). Delete it and call again: tuning begins from the start. The model "
                "was not changed."
            ) from None
        if metadata.get("run") != self.run:
            raise ValueError(
                f"{self.file} belongs to another run: another model, teacher or options. Choose another "
                "resume_folder, or delete this one. The model was not changed."
            )
        self._step = int(metadata["step"])
