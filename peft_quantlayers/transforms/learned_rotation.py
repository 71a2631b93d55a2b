"""Train the rotations of a model so that rounding its weights changes its predictions least.

A rotated model computes what it did, so nothing of it is rotated here but the rounding: each quantized weight is seen
as its rotated and rounded form would be, turned back into the basis in which the model is.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from ..calibration.blocks import Call, evaluating, frozen, real_logits
from ..calibration.model_calls import model_calls
from ..formats import QuantSpec
from ..methods import HQQSpec, get_method
from .cayley import TrainedRotation, rounded_in_groups
from .folds import Fold, input_weight, matrices
from .residual_stream import ResidualStream
from .transform_base import Surroundings

logger = logging.getLogger(__name__)

# Windows of the calibration data; every fourth is left out of the training, and judges it.
WINDOWS, WINDOW_TOKENS = 32, 128


@dataclass(kw_only=True, eq=False)
class RotationsToLearn:
    """Where they are in a model, and with what they start.

    Fields:
        stream: the residual stream, rotated by ``residual``, or None.
        heads: attentions, each rotated by its own of ``of_heads``.
    """

    stream: ResidualStream | None
    residual: TrainedRotation | None
    heads: Sequence[Fold]
    of_heads: Sequence[TrainedRotation]

    @property
    def all(self) -> list[TrainedRotation]:
        """All that are trained."""
        return [*([] if self.residual is None else [self.residual]), *self.of_heads]


def learn(model: nn.Module, rotations: RotationsToLearn, surroundings: Surroundings, *, steps: int) -> None:
    """Train ``rotations`` on calibration data; they are as they were if that lowers nothing on windows left out.

    ``model`` is the same to the bit afterwards.

    Raises:
        TypeError: the model gives no logits.
        ValueError: none of the layers to quantize, which the rotations change, is rounded to HQQ's grid.
    """
    specs = {name: spec for name, spec in (surroundings.specs or {}).items() if _is_rounded(spec)}
    calls = _windows(model, surroundings)
    judged = calls[3::4] or calls[:1]
    trained = [call for number, call in enumerate(calls) if number % 4 != 3]
    with _seen_rounded(model, rotations, specs) as bases, evaluating(model):
        before = _mean_loss(model, bases, judged)
        optimizer = torch.optim.Adam(
            [
                # A step of so much in each coordinate is a turn by about 0.05.
                {"params": [each.coordinates], "lr": 0.025 / math.sqrt(len(each.start))}
                for each in rotations.all
            ]
        )
        rates = [group["lr"] for group in optimizer.param_groups]
        bar = tqdm(range(steps), desc="Learning rotations", unit="step", disable=not surroundings.progress)
        for step in bar:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            with torch.enable_grad():
                bases.update()
                loss = _loss(model, bases, trained[step % len(trained)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix(kl=f"{loss.item():.4f}")
        after = _mean_loss(model, bases, judged)
    if not after < before:
        for each in rotations.all:
            each.coordinates.data.zero_()
    logger.info(
        "learned rotations: KL of rounded weights %.4f, and %.4f at the start%s",
        after,
        before,
        "" if after < before else ", which is kept",
    )


def _is_rounded(spec: QuantSpec) -> bool:
    is_rotated = getattr(spec, "rotate_inputs", False)  # by the layer itself, whose grid is then of another basis
    return isinstance(spec, HQQSpec) and spec.axis == 1 and not is_rotated


def _windows(model: nn.Module, surroundings: Surroundings) -> list[Call]:
    assert surroundings.calibration is not None  # needs_calibration
    few = dataclasses.replace(
        surroundings.calibration,
        n_tokens=min(surroundings.calibration.n_tokens, WINDOWS * WINDOW_TOKENS),
        sequence_length=min(surroundings.calibration.sequence_length, WINDOW_TOKENS),
        batch_size=1,
    )
    return model_calls(model, few.batches(model))


def _log_probs(model: nn.Module, call: Call) -> Tensor:
    logits = real_logits(
        model,
        call,
        otherwise=', by which rotations are learned. Take a model with a head, or Rotation(kind="hadamard"). The '
        "model was not changed.",
    )
    return logits.float().log_softmax(-1)


def _loss(model: nn.Module, bases: _Bases, call: Call) -> Tensor:
    """Mean KL divergence from the float model's predictions, which are not kept: those of all windows are large."""
    with torch.no_grad(), bases.left_out():
        theirs = _log_probs(model, call)
    ours = _log_probs(model, call)
    return (theirs.exp() * (theirs - ours)).sum(-1).mean()


@torch.no_grad()
def _mean_loss(model: nn.Module, bases: _Bases, calls: Sequence[Call]) -> float:
    bases.update()
    return sum(float(_loss(model, bases, call)) for call in calls) / len(calls)


class _Bases:
    """The matrices of this step, which all weights share."""

    def __init__(self, rotations: RotationsToLearn) -> None:
        self.rotations, self.is_active = rotations, True
        self.matrices: dict[TrainedRotation, Tensor] = {}

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """While this is open, weights are as they are."""
        self.is_active = False
        try:
            yield
        finally:
            self.is_active = True

    def update(self) -> None:
        self.matrices = {each: each() for each in self.rotations.all}


@dataclass(eq=False)
class _Sides:
    """What turns one weight.

    Fields:
        spec: what it is rounded to.
        gain: of the norm that its inputs come from, (in_features,), or None.
        inputs, outputs: the stream's rotation, where its inputs or outputs are the stream's.
        head_inputs, head_outputs: an attention's, with the size of a head.
        rows: of its outputs, those that are the attention's values; None for all.
    """

    spec: QuantSpec
    gain: Tensor | None = None
    inputs: TrainedRotation | None = None
    outputs: TrainedRotation | None = None
    head_inputs: tuple[TrainedRotation, int] | None = None
    head_outputs: tuple[TrainedRotation, int] | None = None
    rows: Tensor | None = None


class _SeenRounded(nn.Module):
    """A weight as it is once it is rotated, rounded and turned back: a parametrization of the module that has it."""

    bases: _Bases

    def __init__(self, sides: _Sides, bases: _Bases, *, is_transposed: bool) -> None:
        super().__init__()
        self.sides, self.is_transposed = sides, is_transposed
        self.__dict__["bases"] = bases  # whose rotations are no parameters of the model

    def forward(self, weight: Tensor) -> Tensor:
        if not self.bases.is_active:
            return weight
        sides = self.sides
        matrix = (weight.transpose(-1, -2) if self.is_transposed else weight).float()
        if sides.gain is not None:
            matrix = matrix * sides.gain
        matrix = self._turned(_rounded(self._turned(matrix, back=False), sides.spec), back=True)
        if sides.gain is not None:
            matrix = torch.where(sides.gain == 0, 0, matrix / sides.gain)
        return (matrix.transpose(-1, -2) if self.is_transposed else matrix).to(weight.dtype)

    def _turned(self, matrix: Tensor, *, back: bool) -> Tensor:
        sides, matrices = self.sides, self.bases.matrices

        def turn(of: TrainedRotation) -> Tensor:
            return matrices[of].t() if back else matrices[of]

        if sides.inputs is not None:
            matrix = matrix @ turn(sides.inputs)
        if sides.outputs is not None:
            matrix = turn(sides.outputs).t() @ matrix
        if sides.head_inputs is not None:
            rotation, size = sides.head_inputs
            matrix = (matrix.unflatten(-1, (-1, size)) @ turn(rotation)).flatten(-2)
        if sides.head_outputs is not None:
            rotation, size = sides.head_outputs
            rows = torch.arange(len(matrix), device=matrix.device) if sides.rows is None else sides.rows
            values = torch.einsum("ji,hjk->hik", turn(rotation), matrix[rows].unflatten(0, (-1, size))).flatten(0, 1)
            matrix = matrix.index_copy(0, rows, values)
        return matrix


def _rounded(weight: Tensor, spec: Any) -> Tensor:
    """The values that the method gives, with the gradient of a plain grid for each group."""
    by_groups, method = rounded_in_groups(weight, spec.nbits, spec.group_size), get_method(spec.method)
    with torch.no_grad():
        each = [method.dequantize(method.quantize(matrix.contiguous(), spec)) for matrix in matrices(weight.detach())]
        rest = torch.stack(list(each)).view_as(weight) - by_groups
    return by_groups + rest


@contextmanager
def _seen_rounded(model: nn.Module, rotations: RotationsToLearn, specs: Mapping[str, QuantSpec]) -> Iterator[_Bases]:
    """While this is open, the layers ``specs`` that a rotation changes compute as they will when quantized."""
    sides = {name: _Sides(spec) for name, spec in specs.items()}
    touched: set[str] = set()
    if (stream := rotations.stream) is not None:
        for norm_name, readers in stream.readers.items():
            norm: Any = model.get_submodule(norm_name)
            gain = norm.weight.detach().float() + stream.norms[norm_name]
            for name in set(readers) & sides.keys():
                sides[name].gain, sides[name].inputs = gain, rotations.residual
                touched.add(name)
        for name in set(stream.writers) & sides.keys():
            sides[name].outputs = rotations.residual
            touched.add(name)
    for fold, rotation in zip(rotations.heads, rotations.of_heads, strict=True):
        if fold.source in sides:
            sides[fold.source].head_outputs, sides[fold.source].rows = (rotation, fold.head_dim), fold.rows
            touched.add(fold.source)
        for name in set(fold.readers) & sides.keys():
            sides[name].head_inputs = (rotation, fold.head_dim)
            touched.add(name)
    if not touched:
        raise ValueError(
            f"no layer of {type(model).__name__} that a rotation changes is rounded to HQQ's grid (axis=1), on which "
            "rotations are learned. For other methods learn them with transform_model(model, "
            'Rotation(kind="learned"), config=HQQConfig(nbits=...), ...), and quantize then. The model was not '
            "changed."
        )
    bases, parametrized = _Bases(rotations), []
    with frozen(model):
        try:
            for name in sorted(touched):
                module, key = _parameter_at(model, name)
                is_transposed = input_weight(model, name).stride() != module.get_parameter(key).stride()
                seen = _SeenRounded(sides[name], bases, is_transposed=is_transposed)
                parametrized.append((module, key))
                parametrize.register_parametrization(module, key, seen, unsafe=True)
            yield bases
        finally:
            for module, key in parametrized:
                if parametrize.is_parametrized(module, key):
                    parametrize.remove_parametrizations(module, key, leave_parametrized=False)


def _parameter_at(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the weight of the layer, or fused weight, ``name``, and its name there."""
    parent, _, last = name.rpartition(".")
    owner = model.get_submodule(parent)
    return (owner, last) if last in owner._parameters else (model.get_submodule(name), "weight")
