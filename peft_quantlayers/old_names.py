"""Deprecated names: attributes of public classes, and modules that were renamed. Using one warns.

Old code finds what it names, and so do old pickles of values: specs, configs and quantized weights. Imports nothing of
ours at its top: modules are imported when one of their names is used.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from functools import partial
from types import ModuleType
from typing import Any

PACKAGE = __name__.rpartition(".")[0]

# Modules that were renamed, and those where their public names are now.
MOVED_MODULES: dict[str, tuple[str, ...]] = {
    "adapters": ("lora", "merging", "model_merge", "scales"),
    "adapters.aware": ("lora.merge_aware",),
    "adapters.lora": ("lora.layer", "lora.merge_strategy"),
    "adapters.merge": ("model_merge",),
    "adapters.projections": ("lora.fused_projections",),
    "adapters.report": ("merging",),
    "adapters.scales": ("scales.tuned_layers",),
    "adapters.scales_config": ("scales.scales_config",),
    "adapters.stamp": ("lora.merge_aware_config",),
    "calibration.quantize": ("calibration.quantize_calibrated",),
    "quantizers": ("methods",),
    "quantizers.aqlm": ("methods",),
    "quantizers.config": ("methods",),
    "quantizers.hqq": ("methods",),
    "quantizers.method": ("methods",),
}


class OldName:
    """The deprecated name of an attribute or method: ``old = OldName("new")`` in the body of a class."""

    def __init__(self, new: str) -> None:
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        _warn(f"{self.old} is now {self.new}")
        return getattr(instance, self.new)


def add_old_modules() -> None:
    """Make the old names of modules importable. Nothing is imported before one of their names is used."""
    for old, new in MOVED_MODULES.items():
        module: Any = ModuleType(f"{PACKAGE}.{old}", f"Deprecated name of {', '.join(new)}.")
        module.__path__ = []
        module.__getattr__ = partial(_moved, old, new)
        sys.modules[module.__name__] = module


def _moved(old: str, new: tuple[str, ...], name: str) -> Any:
    if not name.startswith("__"):  # as of code that looks at each module's __file__
        for place in new:
            module = importlib.import_module(f"{PACKAGE}.{place}")
            if hasattr(module, name):
                _warn(f"{PACKAGE}.{old}.{name} is now {PACKAGE}.{place}.{name}")
                return getattr(module, name)
    raise AttributeError(f"module {f'{PACKAGE}.{old}'!r} has no attribute {name!r}")


def _warn(what: str) -> None:
    warnings.warn(f"{what}; the old name will be removed.", DeprecationWarning, stacklevel=3)
