"""Private names of PEFT that packages below this one need, each in one place. Imports PEFT only."""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

# LoRA-GA's name for the gradient that it initialises an adapter from.
_LORAGA_GRADIENT = "_peft_loraga_grad"


def variant_caches(lora_layer: Any) -> dict[str, Any]:
    """What LoRA variants keep between a merge and its unmerge (DoRA: the weight's norm), as a copy."""
    return dict(lora_layer._caches)


def set_variant_caches(lora_layer: Any, caches: dict[str, Any]) -> None:
    """Restore :func:`variant_caches`."""
    lora_layer._caches = dict(caches)


def available_adapters(layer: BaseTunerLayer) -> set[str]:
    """Names of the adapters on a layer, active or not."""
    return layer._get_available_adapters()


def tied_target_modules(tuner: Any) -> list[str]:
    """Names of the layers with an adapter that share their weight with another layer."""
    return tuner._get_tied_target_modules(tuner.model)


def set_loraga_gradient(layer: Any, gradient: Any) -> None:
    """Store the mean gradient of a layer's weight where PEFT's LoRA-GA initialisation looks for it."""
    setattr(layer, _LORAGA_GRADIENT, gradient)
