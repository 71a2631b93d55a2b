"""Quantized layers that read the same input, computed in one call of a kernel: a few tokens on a CPU, in inference.

For a small layer each question that is asked in Python takes as long as a part of the product. So the first layer of a
group asks about itself only, and the others, once they are called, whether what was computed for them is still theirs.
Still, one thread gains nothing and computes each layer alone; several are sent to work once and not for each layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantlayers_kernels.prepared import PreparedProducts, go_together

from .direct_product import DirectProduct, direct_product
from .shared_results import SharedResults, Waste

if TYPE_CHECKING:
    from .linear import QuantizedLinear


class SharedProduct(SharedResults):
    """Quantized layers whose products with one input the first that is called computes."""

    def __init__(self, layers: Sequence[QuantizedLinear], names: Sequence[str], waste: Waste) -> None:
        this = weakref.ref(self)

        def forget(_: object) -> None:
            group = this()
            if group is not None:
                group.forget()

        super().__init__(layers, names, waste, when_one_is_gone=forget)
        self.forget()

    def forget(self) -> None:
        """Drop what was prepared, and with it the memory of the layers' weights; the next call prepares it again."""
        self._products: PreparedProducts | None = None
        self._states: dict[int, Any] = {}
        self._parameters: list[dict[str, Any]] = []
        self._memory: list[Any] = []

    def __call__(self, layer: QuantizedLinear, direct: DirectProduct, x: Tensor) -> Tensor | None:
        """The result of ``layer``, whose current product is ``direct``; None where it is to be computed alone."""
        y = self.found(layer, x)
        if y is None and torch.get_num_threads() == 1:
            return None
        state = direct.state(layer)
        is_as_prepared = state is not None and self._states.get(id(layer)) == state
        if y is not None:
            if is_as_prepared:
                return y
            self.forget()  # the kernel may have read what was there before
            return None
        if not is_as_prepared:
            self._prepare()
        # Nothing would show a later write to an inference tensor.
        if self._products is None or x.dtype is not layer.compute_dtype or x.is_inference():
            return None
        results = self._products(x, self._parameters)
        if results is None:
            return None
        by_layer = dict(zip(self._states, results, strict=True))
        y = by_layer.pop(id(layer))
        self.keep(x, by_layer)
        return y

    def _prepare(self) -> None:
        """Look at all layers: what their products depend on, and whether they go together."""
        self.forget()
        layers = self.layers()
        directs = [direct_product(each) for each in layers]
        states = [direct.state(layer) for layer, direct in zip(layers, directs, strict=True)]
        self._states = {id(layer): state for layer, state in zip(layers, states, strict=True)}
        products = [direct.product_for(layer) for layer, direct in zip(layers, directs, strict=True)]
        known = [each for each in products if each is not None]
        dtypes = {layer.compute_dtype for layer in layers}
        if len(known) == len(layers) and None not in states and len(dtypes) == 1 and go_together(known):
            self._parameters = [layer._parameters for layer in layers]
            # The kernel reads the memory of layers that are not asked whether it is still theirs.
            self._memory = [each.untyped_storage() for layer in layers for each in layer._tensors().values()]
            self._products = PreparedProducts(known)
