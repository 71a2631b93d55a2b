"""What the layers of a model read when it reads a text: magnitudes, and some rows for errors of outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calibration.model_calls import model_calls
from ..layers import QuantizedLinear
from ..layers.quantized_layers import quantized_modules
from .layer_facts import quantiles

# Input rows of a layer that are kept, evenly from the text.
ROWS = 128


@dataclass(frozen=True)
class LayerInputs:
    """What one layer read.

    Fields:
        rows: some of its inputs, (n, in_features), in their own dtype.
        magnitudes: of the numbers in these, at :data:`layer_facts.QUANTILES`.
    """

    rows: Tensor
    magnitudes: tuple[float, ...]


@torch.no_grad()
def layer_inputs(model: Any, token_ids: Tensor, *, window: int = 512) -> dict[str, LayerInputs]:
    """The inputs of each quantized linear layer; those that the text does not reach have no entry.

    Args:
        model: any that reads tokens.
        token_ids: the text, (n_tokens,).
        window: tokens that are read together; an incomplete last window is left out, unless it is the only one.
    """
    window = min(window, len(token_ids))
    n_windows = len(token_ids) // window
    windows = token_ids[: n_windows * window].view(n_windows, window).to(model.device)
    kept: dict[str, list[Tensor]] = {}
    per_window = -(-ROWS // n_windows)

    def keep(name: str) -> Callable[..., None]:
        def hook(module: QuantizedLinear, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0].detach().reshape(-1, module.in_features)
            if len(rows):
                kept.setdefault(name, []).append(rows[:: max(1, len(rows) // per_window)][:per_window].clone())

        return hook

    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in quantized_modules(model).items()]
    was_training = model.training
    model.eval()
    try:
        for call in model_calls(model, list(windows[:, None])):
            model(*call.args, **call.kwargs)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    rows_of = {name: torch.cat(rows) for name, rows in kept.items()}
    return {name: LayerInputs(rows, quantiles(rows.float().abs())) for name, rows in rows_of.items()}
