"""One quantized weight as a value: a spec, a shape and the tensors. No layer, no arithmetic."""

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .spec import QuantSpec


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A weight (out_features, in_features) in quantized form.

    Invariant: ``tensors`` has exactly the names, shapes and dtypes of
    ``spec.tensor_layout(out_features, in_features)``.
    """

    spec: QuantSpec
    out_features: int
    in_features: int
    tensors: dict[str, Tensor]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and all other metadata included."""
        nbytes = sum(tensor.nbytes for tensor in self.tensors.values())
        return 8 * nbytes / (self.out_features * self.in_features)

    def to(self, device: torch.device) -> Self:
        """The same weight on ``device``; tensors that are there already are shared."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)

    def check(self, name: str) -> None:
        """Raise ValueError, naming the layer ``name``, unless the invariant holds and the values make sense."""
        layout = self.spec.tensor_layout(self.out_features, self.in_features)
        if set(layout) != set(self.tensors):
            raise ValueError(f"{name}: expected the tensors {sorted(layout)}, got {sorted(self.tensors)}.")
        for tensor_name, expected in layout.items():
            tensor = self.tensors[tensor_name]
            if tuple(tensor.shape) != expected.shape or tensor.dtype != expected.dtype:
                raise ValueError(
                    f"{name}.{tensor_name}: expected {expected.dtype} of shape {expected.shape}, got "
                    f"{tensor.dtype} of shape {tuple(tensor.shape)}. The file does not match its configuration."
                )
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{name}.{tensor_name} holds NaN or Inf: the checkpoint is damaged.")
        if damage := self.spec.find_damage(self.tensors):
            raise ValueError(f"{name}{damage}: the checkpoint is damaged. Download or save it again.")


def stored_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of one dimension or more as they lie in memory row by row, for checksums."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
