"""A dense view of a quantized weight: a tensor that reads as the dequantized weight and writes back to its layer.

The weight is dequantized when an operator needs its values; shape, dtype and device cost nothing. Operators that
change the tensor in place, also through a view of it, are recognised by their schema and requantize the layer, so no
write is lost.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..integrations.private_transformers import mark_as_initialized


class QuantizedSource(Protocol):
    """The owner of the quantized weight behind a :class:`WriteThroughWeight`: a quantized linear layer."""

    in_features: int
    out_features: int
    compute_dtype: torch.dtype
    layer_name: str

    @property
    def n_writes(self) -> int: ...

    @property
    def codes(self) -> Tensor: ...

    def dequantize(self) -> Tensor: ...

    def write_weight(self, weight: Tensor) -> None: ...


class WriteThroughWeight(Tensor):
    """``layer.weight`` of a quantized layer, (out_features, in_features) in the layer's compute dtype.

    It holds the values that were written to it; the layer holds their quantization. Reading ``layer.weight`` again
    gives the quantized values. It never requires a gradient: adapters are trained, codes are not.
    """

    _layer: QuantizedSource
    _dense: Tensor | None
    _root: WriteThroughWeight
    _n_writes_seen: int

    @staticmethod
    def __new__(cls, layer: QuantizedSource) -> WriteThroughWeight:
        weight = torch.Tensor._make_wrapper_subclass(
            cls,
            (layer.out_features, layer.in_features),
            dtype=layer.compute_dtype,
            device=layer.codes.device,
        )
        weight._layer, weight._dense, weight._root = layer, None, weight
        return weight

    def __init__(self, layer: QuantizedSource) -> None:
        pass

    def _view(self, dense: Tensor) -> WriteThroughWeight:
        view = torch.Tensor._make_wrapper_subclass(
            type(self),
            dense.shape,
            strides=dense.stride(),
            storage_offset=dense.storage_offset(),
            dtype=dense.dtype,
            device=dense.device,
        )
        view._layer, view._dense, view._root = self._layer, dense, self._root
        return view

    def dense(self) -> Tensor:
        """The plain tensor behind this one; writing to *that* does not reach the layer."""
        if self._dense is None:
            with torch.no_grad():
                self._dense = self._layer.dequantize()
            self._n_writes_seen = self._layer.n_writes
        return self._dense

    def is_held_by(self, layer: QuantizedSource) -> bool:
        """Whether writing this tensor to ``layer`` changes nothing: it was read from it, or written to it last."""
        is_whole = self._root is self and self._layer is layer
        return is_whole and (self._dense is None or self._n_writes_seen == layer.n_writes)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        plain_args, plain_kwargs = tree_map_only(cls, cls.dense, (args, kwargs))
        result = func(*plain_args, **plain_kwargs)

        schema_arguments = func._schema.arguments
        given = list(zip(schema_arguments, args, strict=False))
        given += [(argument, kwargs[argument.name]) for argument in schema_arguments if argument.name in kwargs]
        written = viewed = None
        for argument, value in given:
            if argument.alias_info is None:
                continue
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if not isinstance(tensor, cls):
                    continue
                if argument.alias_info.is_write:
                    written = tensor
                    tensor._layer.write_weight(tensor._root.dense())
                    tensor._root._n_writes_seen = tensor._layer.n_writes
                else:
                    viewed = tensor
        if written is not None:
            return written if isinstance(result, Tensor) else result
        if viewed is not None:
            return tree_map_only(Tensor, viewed._view, result)
        return result

    @property
    def data(self) -> Tensor:
        """This tensor itself: it never has a gradient, and a write to ``.data`` must reach the layer too."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        if isinstance(value, WriteThroughWeight) and value.is_held_by(self._layer):
            return  # ``weight.data += delta`` has written already
        if self._root is not self:
            raise NotImplementedError("assign to the .data of layer.weight itself, not to that of a view of it.")
        self._layer.write_weight(value)
        self._dense = None

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> WriteThroughWeight:
        """Raises NotImplementedError for True: train an adapter, or ``modules_to_save`` on a dense layer, instead."""
        if requires_grad:
            raise NotImplementedError(
                f"{self._layer.layer_name}: a quantized weight takes no gradient. Train an adapter on it (LoRA and "
                "others), or keep the layer dense with skip_modules."
            )
        return self

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only array: a write to a numpy array could not reach the layer."""
        array = self.dense().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> list:
        return self.dense().tolist()

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.dense().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().clone().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.dense()!r})"


mark_as_initialized(WriteThroughWeight)  # these weights always come from codes


def written_values(weight: Tensor, device: torch.device) -> Tensor:
    """The plain values of ``weight``, which is written to a layer on ``device``; also of another layer's weight."""
    return (weight.dense() if isinstance(weight, WriteThroughWeight) else weight).detach().to(device)
