"""Folders with a saved model: whether they can be read again, and which tensors are damaged."""

from __future__ import annotations

import json
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..formats.checksums import DamagedTensor, find_damage, has_checksums
from .checkpoint_headers import CheckpointFiles
from .transformers_config import QuantlayersConfig
from .transformers_quantizer import QuantlayersHfQuantizer


def check_readable(folder: Path, model: nn.Module) -> None:
    """Raise ValueError unless loading ``folder`` into a model of this kind would find what it asks for.

    Headers only: what loading checks before it reads a tensor, with the same code.
    """
    files = [str(file) for file in weight_files(folder)]
    fields = json.loads((folder / "config.json").read_text()).get("quantization_config")
    if fields is None:
        CheckpointFiles(files)
        return
    config = type(model.config).from_pretrained(folder)
    with torch.device("meta"):
        skeleton = type(model)(config)
    quantizer = QuantlayersHfQuantizer(QuantlayersConfig.from_dict(fields), pre_quantized=True)
    quantizer.are_checksums_checked = False
    quantizer.preprocess_model(skeleton, checkpoint_files=files)


def verify_model(folder: str | Path) -> list[DamagedTensor]:
    """The tensors of a saved model or adapter that are not as they were saved; [] if all are. Builds no model.

    Reads every byte once, with the checksums that ``save_model`` and ``save_pretrained`` of a quantized model, or of
    an adapter on one, leave in the files. Loading checks the same.

    Args:
        folder: with the safetensors files of a model, or of an adapter.

    Raises:
        FileNotFoundError: no model is in ``folder``.
        ValueError: its files carry no checksums: another program wrote them, or an older version of this one.
    """
    opened: dict[str, Any] = {}
    damage = []
    for file in weight_files(Path(folder)):
        if not file.exists():
            damage.append(DamagedTensor("", file.name, "is missing"))
            continue
        try:
            opened |= CheckpointFiles([str(file)]).opened
        except ValueError as error:
            damage.append(DamagedTensor("", file.name, str(error)))
    if opened and not has_checksums(opened):
        raise ValueError(
            f"the files in {folder} carry no checksums, so they cannot be verified. Load the model and save it "
            "with peft_quantlayers.save_model to add them (an adapter: with its own save_pretrained)."
        )
    return damage + find_damage(opened)


def tensors_not_finite(folder: str | Path) -> list[str]:
    """The names of tensors with NaN or Inf in the weights of a saved model or adapter. Builds no model.

    Files that cannot be read are left out: :func:`verify_model` names them, or loading does.
    """
    try:
        files = weight_files(Path(folder))
    except (FileNotFoundError, ValueError):
        files = []
    found: list[str] = []
    for file in files:
        with suppress(OSError, SafetensorError), safe_open(file, "pt") as opened:
            found += [name for name in opened.keys() if not _is_finite(opened.get_tensor(name))]  # noqa: SIM118
    pickled = Path(folder) / WEIGHTS_NAME
    if not files and pickled.is_file():
        with suppress(OSError, RuntimeError, pickle.UnpicklingError):
            found += [
                name for name, tensor in torch.load(pickled, weights_only=True).items() if not _is_finite(tensor)
            ]
    return found


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    # torch.isfinite knows no numbers of a byte.
    return bool(torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float()).all())


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model or adapter in ``folder``, whether they are there or not.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the index is damaged.
    """
    indices = sorted(folder.glob("model*.safetensors.index.json"))
    if indices:
        try:
            names = set(json.loads(indices[0].read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{indices[0]} is damaged ({error!r}). Download or save the model again.") from None
        return [folder / name for name in sorted(names)]
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob(SAFETENSORS_WEIGHTS_NAME))
    if not files:
        raise FileNotFoundError(f"{folder} holds no model.safetensors and no model.safetensors.index.json.")
    return files
