"""Folders in which a save was killed while it moved files: what stands in them, and how a reader gets the old model.

:mod:`..storage.staging` says how files are moved. transformers reads config.json first, so that is where a folder is
taken back to the model that was there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..formats.checkpoint import QUANT_METHOD
from ..storage import FolderContents, is_interrupted, recover_folder

# Of the model itself; adapter_model.safetensors and other programs' files are not ours to remove.
_WEIGHTS = re.compile(r"model[^/]*\.safetensors(\.index\.json)?")
# A writer holds the lock with a placeholder in the folder for the milliseconds in which it moves files.
_WAIT_SECONDS = 30.0


def _placeholder(folder: Path) -> Mapping[str, Any]:
    """The config.json of a folder whose files are being moved; no reader of models takes it."""
    reason = (
        "none: a save into this folder was interrupted while files were moved. Loading it with peft_quantlayers "
        f"imported, or peft_quantlayers.undo_interrupted_save({str(folder)!r}), brings back the model that was there"
    )
    # transformers shows the model type that it does not know; our own quantizer refuses the rest.
    return {"model_type": reason, "quantization_config": {"quant_method": QUANT_METHOD, "interrupted_save": reason}}


MODEL_FILES = FolderContents(
    first_read="config.json",
    placeholder=_placeholder,
    is_replaced=lambda name: _WEIGHTS.fullmatch(name) is not None,
)


def undo_interrupted_save(folder: str | Path) -> bool:
    """Take ``folder`` back to the model that it held before a :func:`save_model` was killed, and clean up after that.

    Loading does the same where it has to; this also removes what a save left that was killed while it wrote.

    Returns:
        Whether there was anything to do.

    Raises:
        FileExistsError: a process is saving into ``folder`` now.
    """
    return recover_folder(folder, MODEL_FILES)


def get_config_dict(original: Callable[..., Any], folder: Any, *args: Any, **kwargs: Any) -> Any:
    """``PreTrainedConfig.get_config_dict``; a folder that was left half moved holds its old model again first.

    Raises:
        OSError: it cannot: the folder is read-only, or being saved into for longer than files take to be moved.
    """
    path = Path(folder, kwargs.get("subfolder") or "") if isinstance(folder, str | os.PathLike) else None
    if path is not None and is_interrupted(path, MODEL_FILES):
        try:
            recover_folder(path, MODEL_FILES, wait_seconds=_WAIT_SECONDS)
        except OSError as error:
            raise OSError(
                f"a save into {path} was interrupted while files were moved, and the model that was there cannot be "
                f"brought back ({error}). Make the folder writable, or copy it, and load that."
            ) from error
    return original(folder, *args, **kwargs)
