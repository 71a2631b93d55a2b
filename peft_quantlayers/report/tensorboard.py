"""While a run goes on: what the report will show of its base and its adapter, in TensorBoard."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from ..layers.codes_parameter import is_sharded
from ..layers.quantized_layers import layers_without_copies
from ..methods.hqq import HQQSpec
from .layer_facts import MEDIAN, distributions_of
from .model_parts import distribution_plots
from .svg_plots import heat_map, is_in_blocks
from .training_parts import delta_norms


class LayerFiguresCallback(TensorBoardCallback):
    """transformers' TensorBoard callback, which also draws figures over the layers of the model.

    At the beginning the distributions of the base's scales, zeros and codebooks. At each save and evaluation the
    adapter's norm in each layer, and for HQQ the delta beside the quantization step: where its RMS is well below half
    a step, a merge by rounding keeps little of it. Between these nothing is computed.

    For ``Trainer(callbacks=[...])``, in the place of transformers' own. Needs tensorboard and matplotlib.
    """

    def __init__(self, tb_writer: Any = None) -> None:
        super().__init__(tb_writer)
        self._steps: dict[str, tuple[float, int]] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the base."""
        super().on_train_begin(args, state, control, **kwargs)
        model: Any = kwargs.get("model")
        if not self._is_drawn(model):
            return
        layers = {_own_name(name): layer for name, layer in layers_without_copies(model).items()}
        found = {name: distributions_of(layer.quantized_weight) for name, layer in layers.items()}
        for name, layer in layers.items():
            if isinstance(layer.spec, HQQSpec) and "scale" in found[name]:
                self._steps[name] = found[name]["scale"][MEDIAN], math.prod(layer.quantized_weight.shape)
        for label, figure in distribution_plots(found).items():
            self.tb_writer.add_figure(f"base/{label}", figure, state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw the adapter."""
        self._draw(state, kwargs.get("model"))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the adapter."""
        self._draw(state, kwargs.get("model"))

    def _is_drawn(self, model: Any) -> bool:
        """Whether this process writes, and has the whole of every tensor: gathering takes all processes."""
        return self.tb_writer is not None and model is not None and not any(map(is_sharded, model.parameters()))

    def _draw(self, state: TrainerState, model: Any) -> None:
        if not self._is_drawn(model):
            return
        norms = delta_norms({name: each.detach() for name, each in model.named_parameters() if "lora_" in name})
        norms = {name: norm for name, norm in norms.items() if math.isfinite(norm)}
        if not is_in_blocks(norms):
            return
        self.tb_writer.add_figure("adapter/norm", heat_map(norms, label="norm of B A"), state.global_step)
        scalings, over_step = _scalings(model), {}
        for name, norm in norms.items():
            step, n_weights = self._steps.get(name, (0.0, 1))
            if step > 0:
                over_step[name] = norm * scalings.get(name, 1.0) / math.sqrt(n_weights) / step
        if is_in_blocks(over_step):
            figure = heat_map(over_step, label="RMS of the delta / quantization step")
            self.tb_writer.add_figure("adapter/delta over step", figure, state.global_step)
            mean = sum(over_step.values()) / len(over_step)
            self.tb_writer.add_scalar("adapter/delta over step, mean", mean, state.global_step)


def _own_name(name: str) -> str:
    """The name of a layer without what PEFT adds."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def _scalings(model: nn.Module) -> dict[str, float]:
    """What each LoRA layer multiplies its product with."""
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        scaling: Any = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and scaling:
            found[_own_name(name)] = float(next(iter(scaling.values())))
    return found
