"""What quantizing from files to files takes."""

from __future__ import annotations

import math

from transformers import PreTrainedModel

from ..calibration.layer_passes import WAITING_BYTES
from ..layers.dense_types import dense_shape
from ..layers.selection import quantizable_modules, quantizable_tables
from ..methods import QuantConfig
from ..report import summary
from ..streaming.quantize_files import PART_BYTES
from .calibration_time import calibration_seconds
from .estimates import Estimate
from .live_bytes import bytes_of_imports
from .sampled_layers import sample_layers

# A dense tensor is read, and copied where it is written.
_DENSE_COPIES = 2
# Of each token, beside what enters the block: the sum that its branches are added to, and what the one at work reads.
_STATES = 2
# Of the widest layer's inputs: the second moment, and the deviation from the float model's inputs, of all tokens and
# of half of them; and two to choose the damping of the targets with.
_MOMENTS = 6
# Of a weight, in float32, while its codes and its grid take turns.
_WORKING_COPIES = 8


def estimate_quantizing(model: PreTrainedModel, config: QuantConfig, *, calibration_tokens: int = 0) -> Estimate:
    """Memory, disk and time of ``quantize_checkpoint``, by quantizing some random rows for each kind of layer.

    Args:
        model: on the meta device, in the dtype of its files. It is left as it is.
        config: how it will be quantized.
        calibration_tokens: of the calibration; 0 for none. It is taken to have its other defaults.

    Raises:
        ValueError: a shape that the config does not fit.
    """
    specs = quantizable_modules(model, config) | {
        name: spec for name, (_, spec) in quantizable_tables(model, config).items()
    }
    planned = summary(model, config)
    shapes = {name: tuple(dense_shape(model, name)) for name in specs}
    sample = sample_layers(specs, shapes)
    read = max((math.prod(shape[-2:]) for shape in shapes.values()), default=0) * model.dtype.itemsize
    largest = sample.layer_bytes + read + min(PART_BYTES, planned.nbytes)
    dense = max((module.nbytes for module in planned.dense), default=0) * _DENSE_COPIES
    memory = {"libraries": bytes_of_imports(), "largest layer": max(largest, dense)}
    seconds = sample.seconds
    if calibration_tokens:
        of_calibration = _of_calibration(model, shapes, calibration_tokens, sample.layer_bytes)
        memory = {"libraries": memory["libraries"]} | of_calibration
        seconds = calibration_seconds(model, specs, shapes, calibration_tokens)
    return Estimate(step="quantize", memory=memory, disk=planned.nbytes, seconds=seconds)


def _of_calibration(
    model: PreTrainedModel, shapes: dict[str, tuple[int, ...]], n_tokens: int, layer_bytes: int
) -> dict[str, int]:
    """Everything around the blocks, a block twice, the states of all tokens in it, and its widest layer's moments.

    Two models run beside each other. Moments are dropped down to the one that codes are chosen with before the layer
    is at work.

    ``layer_bytes``: what quantizing the largest layer takes without calibration.
    """
    text, size = model.config.get_text_config(), model.dtype.itemsize
    per_block = max(1, len(shapes) // max(1, text.num_hidden_layers))
    of_block = list(shapes.values())[:per_block]
    widest = max(shape[-1] for shape in of_block)
    of_layers = sum(math.prod(shape) for shape in shapes.values()) * size
    moment, states = 4 * widest**2, n_tokens * size * text.hidden_size
    waiting = min(WAITING_BYTES, _STATES * states + n_tokens * size * widest)
    at_work = max(layer_bytes, _WORKING_COPIES * 4 * max(math.prod(shape[-2:]) for shape in of_block))
    return {
        "around the blocks": sum(parameter.nbytes for parameter in model.parameters()) - of_layers,
        "one block, twice": 2 * sum(math.prod(shape) for shape in of_block) * size,
        "activations": 2 * (states + waiting),
        "second moments, or the layer at work": max(_MOMENTS * moment, at_work + moment),
    }
