"""While a run goes on: what the report will show of its adapter, in TensorBoard."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from .svg_plots import heat_map, is_in_blocks
from .training_parts import delta_norms


class LayerFiguresCallback(TensorBoardCallback):
    """transformers' TensorBoard callback, which also draws the adapter's norm in each layer.

    It draws at each save and evaluation. For ``Trainer(callbacks=[...])``, in the place of transformers' own. Needs
    tensorboard and matplotlib.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw."""
        self._draw(state, kwargs.get("model"))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw."""
        self._draw(state, kwargs.get("model"))

    def _draw(self, state: TrainerState, model: Any) -> None:
        if self.tb_writer is None or model is None:  # not the process that writes
            return
        norms = delta_norms({name: each.detach() for name, each in model.named_parameters() if "lora_" in name})
        if is_in_blocks(norms):
            self.tb_writer.add_figure("adapter/norm", heat_map(norms, label="norm of B A"), state.global_step)
