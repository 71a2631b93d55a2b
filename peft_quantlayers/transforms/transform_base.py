"""What a transform is: options that a user gives, and one method that changes a model's weights."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn

from ..arguments import check_fields, check_keywords_only
from ..calibration import Calibration
from ..calibration.blocks import Call
from ..formats import QuantSpec


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a transform may use besides the model.

    Fields:
        call: of the model with a few tokens, to try changes on.
        specs: of the layers that will be quantized, what to; None where that is not known.
        calibration: data; None where none was given.
        device: where statistics are computed; None for where each weight is.
        progress: show a progress bar.
    """

    call: Call
    specs: Mapping[str, QuantSpec] | None = None
    calibration: Calibration | None = None
    device: torch.device | str | None = None
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class Transform(ABC):
    """A change of a float model's weights after which it computes the same, and quantizes better."""

    name: ClassVar[str]
    """In records and messages."""

    def __new__(cls, *positional: Any, **fields: Any) -> Self:
        """Raise TypeError for an unknown field, and list the known ones."""
        check_keywords_only(cls.__name__, positional, f"{cls.__name__}()")
        check_fields(cls.__name__, fields, [field.name for field in dataclasses.fields(cls)])
        return super().__new__(cls)

    @abstractmethod
    def apply(self, model: nn.Module, surroundings: Surroundings) -> None:
        """Change the weights of ``model`` in place.

        Raises:
            ValueError: the model has no place for it; the model was not changed.
        """

    @property
    def needs_calibration(self) -> bool:
        """Whether it measures inputs."""
        return False

    @property
    def needs_config(self) -> bool:
        """Whether it has to know what the layers will be quantized to."""
        return False

    @property
    def is_exact(self) -> bool:
        """Whether the model computes what it did, but for rounding."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the name, and all options."""
        return {"transform": self.name, **dataclasses.asdict(self)}
