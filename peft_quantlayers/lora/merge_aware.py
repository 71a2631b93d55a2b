"""Merge-aware training: the forward pass uses the weight that the merge will produce.

After ``enable_merge_aware`` a layer computes with ``Q(W + delta)``, where ``Q`` is the rounding of
``QuantMethod.merged``; so merging these adapters changes no output. A fingerprint of ``W`` is written into the
adapter's config (``merge_aware_config.py``), is saved with it by ``save_pretrained``, and is compared when the adapter
is loaded or merged.
"""

from __future__ import annotations

import logging
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainerCallback

from ..arguments import check_integer, check_model, check_names, nearest
from ..layers import QuantizedLinear
from ..layers.placement import IN_ONE_PROCESS, check_weights_are_here
from .layer import LoraQuantizedLinear
from .merge_aware_config import fingerprint, with_fingerprints

logger = logging.getLogger(__name__)


def enable_merge_aware(model: nn.Module, adapters: list[str] | None = None) -> None:
    """Train adapters through the rounding that merges them, so that merging them loses nothing.

    From now on quantized layers with these adapters compute what the merged layer will, in training and in
    evaluation. Call it before the training, or during it (``MergeAwareCallback``); the earlier the better. Layers
    that are not quantized train as usual. Merge with ``merge_back(strategy="aware")``.

    Args:
        model: a PEFT model, or a transformers model with adapters, on a quantized base.
        adapters: names; None for the active ones. Adapters that are active together must all be merge-aware.

    Raises:
        TypeError: ``model`` is not a module, ``adapters`` not a list of names.
        ValueError: no such adapter, none of its layers is quantized, ``lora_dropout`` is not 0, or an adapter is
            merged; nothing was changed.
        NotImplementedError: the adapter is more than plain LoRA (DoRA, QA-LoRA, ``lora_bias``, ...); nothing was
            changed.
    """
    check_model("enable_merge_aware", model)
    trained = _enable(model, adapters)
    if trained:
        logger.warning(
            "adapters %s are already trained: from now on they compute through the rounding. Train them further "
            "before the merge, or it is no better than requantizing.",
            trained,
        )


def _enable(model: nn.Module, adapters: list[str] | None) -> list[str]:
    """As :func:`enable_merge_aware`; returns the adapters that already change the model."""
    configs, trained = _configs(model), []
    for name, layers in _checked_layers(model, configs, adapters).items():
        recorded = {}
        if any(cast(nn.Linear, layer.lora_B[name]).weight.any() for layer in layers):
            trained.append(name)
        for layer in layers:
            base = layer.quantized_base()
            recorded[base.layer_name] = layer.aware_adapters[name] = fingerprint(base.quantized_weight)
        configs[name] = with_fingerprints(configs[name], recorded)
    return trained


def _checked_layers(
    model: nn.Module, configs: dict[str, Any], adapters: list[str] | None
) -> dict[str, list[LoraQuantizedLinear]]:
    """The layers of each adapter. Raises as :func:`enable_merge_aware`, and changes nothing."""
    check_names("adapters", adapters, "default")
    layers = [module for module in model.modules() if isinstance(module, LoraQuantizedLinear)]
    tuned = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    names = list(next(tuned).active_adapters) if adapters is None else adapters
    unknown = [name for name in names if name not in configs]
    if unknown:
        raise ValueError(
            f"adapters={adapters!r}: the model has no {unknown[0]!r}{nearest(unknown[0], configs)}; give a list of "
            f"names of {sorted(configs)}."
        )
    found: dict[str, list[LoraQuantizedLinear]] = {}
    for name in names:
        concerned = [layer for layer in layers if name in layer.lora_A]
        if not concerned:
            raise ValueError(f"adapter {name!r} is on no quantized layer: there is no rounding to train through.")
        for layer in concerned:
            _check_trainable(layer, name)
        found[name] = concerned
    return found


class MergeAwareCallback(TrainerCallback):
    """Turns merge-aware training on in a transformers ``Trainer``.

    Args:
        start_step: the optimizer step before which it is turned on; 0 for the whole training.
        adapters: as for :func:`enable_merge_aware`.

    Raises:
        TypeError: ``start_step`` is not an integer, or ``adapters`` not a list of names.
        ValueError, NotImplementedError: ``start_step`` is negative; and at the start of the training, as
            :func:`enable_merge_aware`, or because it ends before ``start_step``.
    """

    def __init__(self, start_step: int = 0, adapters: list[str] | None = None) -> None:
        check_integer("start_step", start_step, at_least=0, at_most=2**62)
        check_names("adapters", adapters, "default")
        self.start_step = start_step
        self.adapters = adapters
        self.is_on = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer before the first step: what would fail at ``start_step`` fails here."""
        if self.start_step >= state.max_steps:
            raise ValueError(
                f"start_step={self.start_step} is never reached: the training has {state.max_steps} optimizer steps. "
                "Choose an earlier one, 0 for all of the training."
            )
        model = kwargs["model"]
        _checked_layers(model, _configs(model), self.adapters)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer before each optimizer step."""
        if not self.is_on and state.global_step >= self.start_step:
            _enable(kwargs["model"], self.adapters)
            self.is_on = True


def _check_trainable(layer: LoraQuantizedLinear, adapter: str) -> None:
    base = layer.quantized_base()
    if not isinstance(base, QuantizedLinear):
        raise ValueError(f"adapter {adapter!r} is on layers that were dequantized: merging them rounds nothing.")
    where = f"{base.layer_name}: adapter {adapter!r}"
    check_weights_are_here(base, f"{where}: merge-aware training", if_sharded=IN_ONE_PROCESS)
    if layer.merged:
        raise ValueError(
            f"{where} cannot be trained merge-aware while {layer.merged_adapters} are merged. Unmerge them."
        )
    if adapter in layer.lora_variant or layer.lora_bias[adapter]:
        raise NotImplementedError(
            f"{where} is more than plain LoRA. Merge-aware training supports plain LoRA and rsLoRA; QA-LoRA merges "
            "exactly without it, and other variants merge by requantization."
        )
    if not isinstance(layer.lora_dropout[adapter], nn.Identity):
        raise ValueError(
            f"{where} has lora_dropout, and a random mask cannot be rounded into a weight. Set lora_dropout=0."
        )


def _configs(model: nn.Module) -> dict[str, Any]:
    """The adapter configs of ``model``, the very mapping that PEFT saves."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and configs:
            return configs
    raise ValueError("the model has no adapter. Add one with peft.get_peft_model(model, LoraConfig(...)).")
