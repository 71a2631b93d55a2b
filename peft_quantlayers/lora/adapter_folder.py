"""Folders with an adapter, before PEFT opens their files."""

import os
from pathlib import Path
from typing import Any

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def refuse_special_files(folder: Any, subfolder: str | None = None) -> None:
    """Raise ValueError if the weights in ``folder`` are a pipe, a device or a folder; reading a pipe may never end.

    Nothing is said of a name that is no folder here: PEFT downloads it.
    """
    for name in _WEIGHTS:
        file = Path(folder, subfolder or "", name)
        if os.path.lexists(file) and not file.is_file():
            raise ValueError(f"{file} is no regular file, and is not opened. Download or save the adapter again.")
