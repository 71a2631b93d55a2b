"""Where files are kept between processes, such as what was measured or fetched once."""

import os
from pathlib import Path

VARIABLE = "PEFT_QUANTLAYERS_CACHE"


def cache_folder() -> Path:
    """``$PEFT_QUANTLAYERS_CACHE``, or ``~/.cache/peft_quantlayers``; not created here."""
    said = os.environ.get(VARIABLE)
    return Path(said) if said else Path.home() / ".cache" / "peft_quantlayers"
