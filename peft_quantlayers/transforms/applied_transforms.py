"""Which transforms a model has: kept in its config, and so in the config.json of everything that is saved of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

KEY = "quantlayers_transforms"


def transforms_of(model: Any) -> list[dict[str, Any]]:
    """What was done to ``model``, or to the model in a folder, before it was quantized, in order.

    Name and options of each; [] for nothing, and where no config says.
    """
    if isinstance(model, (str, Path)):
        file = Path(model, "config.json")
        found: Any = json.loads(file.read_text()).get(KEY) if file.is_file() else None
    else:
        found = getattr(getattr(model, "config", None), KEY, None)
    return [dict(each) for each in found] if are_transforms(found) else []


def add_record(model: nn.Module, transform: dict[str, Any]) -> None:
    """Note one more transform in the config of ``model``, if it has one."""
    config: Any = getattr(model, "config", None)
    if config is not None:
        setattr(config, KEY, [*transforms_of(model), transform])


def in_words(transforms: list[dict[str, Any]]) -> str:
    """Their names; "none" for none."""
    return ", ".join(str(each["transform"]) for each in transforms) or "none"


def are_transforms(value: Any) -> bool:
    """Whether ``value``, read from a file, is a list of transforms."""
    return isinstance(value, list) and all(
        isinstance(each, dict) and isinstance(each.get("transform"), str) for each in value
    )
