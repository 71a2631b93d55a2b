"""Experts that a checkpoint keeps one by one, quantized one by one while they are read.

transformers joins them to a stack first: for a layer of a large mixture more than the whole quantized model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

from torch import Tensor, nn
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

# Puts the weights of all experts, given one after the other as the fused parameter has them, into the model, and
# returns True; or returns False, and takes none, if the parameter is not one that is to be quantized.
TakeExperts = Callable[[nn.Module, str, int, Iterator[Tensor]], bool]


class ExpertByExpert(WeightConverter):
    """A conversion of transformers whose experts are converted, and given to ``take``, one at a time."""

    __slots__ = ("take",)

    def __init__(self, *args: Any, take: TakeExperts, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.take = take

    @classmethod
    def around(cls, entry: Any, take: TakeExperts) -> Any:
        """``entry`` as such a conversion where it joins experts; any other entry as it is."""
        if not isinstance(entry, WeightConverter) or not _joins_experts(entry.operations):
            return entry
        return cls._like(entry, take)

    @classmethod
    def _like(cls, entry: WeightConverter, take: TakeExperts) -> Self:
        made = cls(
            list(entry._original_source_patterns),
            list(entry._original_target_patterns),
            operations=entry.operations,
            force_cpu=entry.force_cpu,
            take=take,
        )
        made.scope_prefix, made.base_model_prefix = entry.scope_prefix, entry.base_model_prefix
        return made

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, Any]:
        sizes = {len(tensors) for tensors in self.collected_tensors.values()}
        if loading_info is not None and len(sizes) == 1:
            experts = self._experts(layer_name, model, config)
            if self.take(model, layer_name, sizes.pop(), experts):
                self.collected_tensors.clear()
                loading_info.missing_keys.discard(layer_name)
                return {}
        return super().convert(
            layer_name, model=model, config=config, hf_quantizer=hf_quantizer, loading_info=loading_info
        )

    def _experts(self, layer_name: str, model: Any, config: Any) -> Iterator[Tensor]:
        collected = {pattern: list(tensors) for pattern, tensors in self.collected_tensors.items()}
        while all(collected.values()):
            one: dict[str, Any] = {pattern: [read_tensor(tensors.pop(0))] for pattern, tensors in collected.items()}
            for operation in self.operations:
                one = operation.convert(
                    one,
                    source_patterns=self.source_patterns,
                    target_patterns=self.target_patterns,
                    full_layer_name=layer_name,
                    model=model,
                    config=config,
                )
            (stack,) = one.values()
            yield stack[0]

    def copy(self, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
        """A plain conversion: what is saved was joined already."""
        made = WeightConverter(source_patterns, target_patterns, **{"force_cpu": self.force_cpu} | kwargs)
        made.scope_prefix, made.base_model_prefix = self.scope_prefix, self.base_model_prefix
        return made

    def reverse_transform(self) -> Any:
        """A plain conversion, by transformers' own way, which in 5.20 does not call ``copy``."""
        plain = self.copy(
            list(self._original_source_patterns), list(self._original_target_patterns), operations=self.operations
        )
        plain.quantization_operation = self.quantization_operation
        return plain.reverse_transform()

    def __deepcopy__(self, memo: dict) -> Self:
        return self._like(self, self.take)  # transformers makes a copy for each tensor


def _joins_experts(operations: list[ConversionOps]) -> bool:
    """Whether the operations stack experts, and do with each what does not depend on the others."""
    first, *rest = operations
    return isinstance(first, MergeModulelist) and first.dim == 0 and all(map(_is_for_each, rest))


def _is_for_each(operation: ConversionOps) -> bool:
    if isinstance(operation, Transpose):
        return 0 not in (operation.dim0, operation.dim1) and not operation.check_dims
    return isinstance(operation, (Concatenate, Interleave)) and operation.dim != 0


def read_tensor(tensor: Any) -> Tensor:
    """The tensor that transformers' loader has read, is reading in a thread, or will read when it is called."""
    if isinstance(tensor, Tensor):
        return tensor
    return tensor() if callable(tensor) else tensor.result()
