"""Which rule PEFT's own merges of quantized layers follow."""

from torch import nn

from ..arguments import check_choice, check_model
from ..merging.strategies import rules_for
from .layer import LoraQuantizedLinear
from .stack_layer import LoraQuantizedStack


def set_merge_strategy(model: nn.Module, strategy: str) -> None:
    """Choose what PEFT's own ``merge_adapter`` and ``merge_and_unload`` do with the quantized layers of ``model``.

    Args:
        model: a PEFT model, or a transformers model with adapters. Layers that get an adapter later start with
            ``"auto"``: call this again after ``add_adapter``.
        strategy: as for :func:`merge_back`; ``"auto"`` is the default.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an unknown strategy, or no layer of ours in the model; nothing was changed.
    """
    check_model("set_merge_strategy", model)
    check_choice(
        "strategy",
        strategy,
        tuple(rules_for("lora")),
        remedy="Calibrated merges need data: peft_quantlayers.merge_back(model, strategy='calibrated', "
        "calibration=..., unload=False), and merge_and_unload() after it.",
    )
    kinds = (LoraQuantizedLinear, LoraQuantizedStack)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    if not layers:
        raise ValueError(
            "the model has no LoRA adapter on a quantized layer, and strategies are for those. PEFT's other tuners "
            'merge by requantizing; merge_back(strategy="dense") gives a float model.'
        )
    for layer in layers:
        layer.merge_strategy = strategy
