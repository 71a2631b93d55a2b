"""What other packages say while the command line works, and what none of its users can change, is left out."""

from __future__ import annotations

import logging
import warnings

# Loggers that warn at import of what is optional.
OF_IMPORTS = ("bitsandbytes.backends.cpu.ops",)


def leave_out_what_others_say() -> None:
    """From now on in this process. Not called with ``--debug``."""
    for name in OF_IMPORTS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for package in ("transformers", "peft", "trl", "torch"):
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"{package}(\.|$)")
