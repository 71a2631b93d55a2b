"""Quantized layers in the place of the linears that PEFT's tests build their models of."""

import sys
from collections.abc import Callable, Collection

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from peft_quantlayers import AQLMSpec, HQQSpec, QuantizedLinear, QuantSpec
from peft_quantlayers.methods.nf4 import NF4Spec


def hqq_spec(linear: nn.Linear) -> HQQSpec:
    """A group for each weight holds any weight exactly.

    PEFT's tests compare merged with unmerged outputs at float tolerances. Packing, scales and requantization are
    those of every other HQQ layer; what rounding loses has its own tests.
    """
    return HQQSpec(nbits=8, group_size=1, scale_dtype="float32")


def aqlm_spec(linear: nn.Linear) -> AQLMSpec:
    """A vector is a row, or as much of one as a vector may be: 256 entries hold a small layer to float32 rounding."""
    length = next(n for n in range(min(linear.in_features, 1024), 0, -1) if linear.in_features % n == 0)
    return AQLMSpec(num_codebooks=1, nbits_per_codebook=8, in_group_size=length, scale_dtype="float32")


def nf4_spec(linear: nn.Linear) -> NF4Spec:
    """A block for each weight holds any weight exactly, as with HQQ."""
    return NF4Spec(block_size=1)


# By hand: the methods that can hold any weight exactly, and how; a method without an entry needs a reason below.
SPECS: dict[str, Callable[[nn.Linear], QuantSpec]] = {"hqq": hqq_spec, "aqlm": aqlm_spec, "nf4": nf4_spec}
# Tests that compare what is kept in memory, not numbers, are given layers as they are used.
COMPARES_MEMORY = ("test_velora_reduces_saved_activation_memory_vs_vanilla_lora",)
# By hand: as they are used.
USUAL_SPECS: dict[str, QuantSpec] = {
    "hqq": HQQSpec(nbits=4, group_size=64),
    "aqlm": AQLMSpec(num_codebooks=1, nbits_per_codebook=8, in_group_size=8),
    "nf4": NF4Spec(),
}
# All other methods, and why they do not run PEFT's tests.
WITHOUT_SPEC = {"rotated_hqq": "a rotation rounds, so no weight is held to the bit that PEFT's tests compare at"}


class Replacement:
    """While entered, every plain ``nn.Linear`` that becomes a part of a model is quantized.

    Attributes:
        is_on: whether it replaces anything; it counts adapters all the same.
        is_exact: whether the layers hold any weight exactly.
        kept_dense: names of modules to leave as they are, as ``skip_modules`` would.
        n_quantized: layers quantized.
        n_adapted: times that PEFT put an adapter on one.
    """

    def __init__(self, method: str) -> None:
        self.method = method
        self._handle: RemovableHandle | None = None
        self.is_on = self.is_exact = True
        self.kept_dense: Collection[str] = ()
        self.n_quantized = self.n_adapted = 0

    def __enter__(self) -> "Replacement":
        self._handle = register_module_module_registration_hook(self._on_registration)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._handle is not None
        self._handle.remove()

    def _on_registration(self, parent: nn.Module, name: str, module: nn.Module) -> nn.Module | None:
        if name == "base_layer" and isinstance(module, QuantizedLinear):
            self.n_adapted += 1
        if not self.is_on or type(module) is not nn.Linear or name in self.kept_dense or _is_peft_building():
            return None
        self.n_quantized += 1
        spec = SPECS[self.method](module) if self.is_exact else USUAL_SPECS[self.method]
        return QuantizedLinear.from_linear(module, spec, layer_name=name)


def _is_peft_building() -> bool:
    """Whether PEFT or we register the module: then it belongs to an adapter, not to the model under test."""
    frame = sys._getframe(1)
    while frame.f_globals["__name__"].partition(".")[0] == "torch" or frame.f_globals["__name__"] == __name__:
        assert frame.f_back is not None
        frame = frame.f_back
    return frame.f_globals["__name__"].startswith("peft")
