"""Quantized layers that read the same input, computed in one call of a kernel: a few tokens on a CPU, in inference.

For a small layer each question that is asked in Python takes as long as a part of the product. So the first layer of a
group asks of the others only whether their tensors lie where they lay, and these, once they are called, whether what
was computed for them is still theirs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from quantlayers_kernels.prepared import PreparedProducts, go_together

from .direct_product import DirectProduct
from .quantized_storage import QuantizedStorage
from .shared_results import SharedResults, Waste


class _Prepared(NamedTuple):
    """What was prepared for the weights that the layers of a group have.

    Fields:
        states: what their products depend on, by the layers' ids; see :meth:`DirectProduct.state`.
        products: None where they cannot be computed together.
        parameters: of each layer, by name.
        places: of all tensors that the kernel reads: the parameters that they are among, name, identity and address.
    """

    states: dict[int, Any]
    products: PreparedProducts | None
    parameters: list[dict[str, Any]]
    places: list[tuple[dict[str, Any], str, int, int]]

    def is_in_place(self) -> bool:
        """Whether all layers still have the tensors that the kernel reads, where they lay."""
        for parameters, name, identity, address in self.places:
            tensor = parameters.get(name)
            if id(tensor) != identity or tensor.data_ptr() != address:  # type: ignore[union-attr]
                return False
        return True


_NOTHING = _Prepared({}, None, [], [])


class SharedProduct(SharedResults):
    """Quantized layers whose products with one input the first that is called computes."""

    def __init__(self, layers: Sequence[QuantizedStorage], names: Sequence[str], waste: Waste) -> None:
        this = weakref.ref(self)

        def forget(_: object) -> None:
            group = this()
            if group is not None:
                group.forget()

        super().__init__(layers, names, waste, when_one_is_gone=forget)
        self._prepared = _NOTHING  # replaced as a whole: several threads may compute

    def forget(self) -> None:
        """Drop what was prepared; the next call prepares it again."""
        self._prepared = _NOTHING

    @property
    def products(self) -> PreparedProducts | None:
        """What computes all of the group at once, once it has; None where nothing does."""
        return self._prepared.products

    def __call__(self, layer: QuantizedStorage, direct: DirectProduct, x: Tensor) -> Tensor | None:
        """The result of ``layer``, whose current product is ``direct``; None where it is to be computed alone."""
        y: Tensor | None = self.found(layer, x)
        prepared, state = self._prepared, direct.state(layer)
        # Nothing would show a later write to an inference tensor.
        if state is None or x.is_inference():
            return None
        is_as_prepared = prepared.states.get(id(layer)) == state
        if y is not None:
            if is_as_prepared:
                return y
            self.forget()  # the kernel may have read what was there before
            return None
        if not (is_as_prepared and prepared.is_in_place()):
            prepared = self._prepared = self._look()
        is_member = id(layer) in prepared.states  # a shallow copy of a member is none
        if prepared.products is None or not is_member or x.dtype is not layer.compute_dtype:
            return None
        results = prepared.products(x, prepared.parameters)
        if results is None:
            return None
        by_layer = dict(zip(prepared.states, results, strict=True))
        y = by_layer.pop(id(layer))
        self.keep(x, by_layer)
        return y

    def _look(self) -> _Prepared:
        """Look at all layers: what their products depend on, and whether they go together."""
        layers = self.layers()
        directs: list[DirectProduct] = [each.direct_product() for each in layers]
        states = [direct.state(layer) for layer, direct in zip(layers, directs, strict=True)]
        by_layer = {id(layer): state for layer, state in zip(layers, states, strict=True)}
        found = [direct.product_for(layer) for layer, direct in zip(layers, directs, strict=True)]
        products = [each for each in found if each is not None]
        dtypes = {layer.compute_dtype for layer in layers}
        if len(products) < len(layers) or None in states or len(dtypes) > 1 or not go_together(products):
            return _Prepared(by_layer, None, [], [])
        places = [
            (layer._parameters, *place)
            for layer, direct in zip(layers, directs, strict=True)
            for place in direct.places
        ]
        return _Prepared(by_layer, PreparedProducts(products), [layer._parameters for layer in layers], places)
