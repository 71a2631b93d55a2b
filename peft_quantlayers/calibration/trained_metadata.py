"""The floating tensors of quantized layers as float32 parameters for the time of a training, and back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..formats.quant_spec import METADATA_ROLES, Role
from ..layers import QuantizedLinear
from ..methods.any_threads import sum_of_all


class TrainedMetadata:
    """What is trained.

    Attributes:
        layers: the quantized layers.
        parameters: their trained tensors, float32, and those that were given beside them.
    """

    def __init__(self, layers: Sequence[QuantizedLinear], parameters: Sequence[nn.Parameter]) -> None:
        self.layers, self.parameters = list(layers), list(parameters)
        self.is_kept = False

    def keep(self) -> None:
        """Keep what was trained. Without this call all is as before in the end.

        Raises:
            ValueError: the dtype of a layer's spec cannot hold a trained tensor; names the layer.
        """
        for layer in self.layers:
            for name, entry in layer.spec.tensor_layout(layer.out_features, layer.in_features).items():
                tensor = layer.get_parameter(name).data
                if entry.dtype.is_floating_point and not torch.isfinite(tensor.to(entry.dtype)).all():
                    raise ValueError(
                        f"{layer.layer_name}: {entry.dtype} cannot hold the finetuned {name}. Use float32."
                    )
        self.is_kept = True

    def rates(self, learning_rate: float) -> list[dict[str, object]]:
        """A group of each parameter for an optimizer: ``learning_rate`` times the parameter's root mean square.

        Scales, zeros and codebooks differ in size by orders of magnitude.
        """
        return [
            {"params": [each], "lr": learning_rate * float(sum_of_all(each.detach().square()) / each.numel()) ** 0.5}
            for each in self.parameters
        ]


@contextmanager
def trained_metadata(
    module: nn.Module,
    layers: Sequence[QuantizedLinear],
    *,
    roles: Collection[Role] = METADATA_ROLES,
    beside: Sequence[nn.Parameter] = (),
) -> Iterator[TrainedMetadata]:
    """While this is open, only the tensors of ``roles`` in ``layers``, and ``beside``, require gradients.

    Whatever happens, the tensors then have the dtypes of their specs again, and all else is as before; what was
    trained stays if :meth:`TrainedMetadata.keep` was called and nothing was raised after it.

    Args:
        module: which holds the layers.
        layers: in ``module``.
        roles: of the tensors to train, as far as a layer's spec lets them be trained: integer zeros stay.
        beside: further float32 parameters of ``module``.
    """
    named = [
        (layer, name)
        for layer in layers
        for name, role in layer.spec.trainable_roles(layer.out_features, layer.in_features).items()
        if role in roles
    ]
    metadata = [layer.get_parameter(name) for layer, name in named]
    trained = TrainedMetadata(layers, list(dict.fromkeys([*metadata, *beside])))
    required = {parameter: parameter.requires_grad for parameter in module.parameters()}
    before = {parameter: parameter.data for parameter in trained.parameters}
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        for parameter in trained.parameters:
            # In memory of its own: what an unmerge restores may be the same tensor.
            parameter.data = parameter.data.to(torch.float32, copy=True)
            parameter.requires_grad_(True)
        yield trained
    except BaseException:
        trained.is_kept = False
        raise
    finally:
        for parameter, was_required in required.items():
            parameter.grad = None
            parameter.requires_grad_(was_required)
        for parameter, data in before.items():
            parameter.data = parameter.data.to(data.dtype) if trained.is_kept else data
