"""The residual stream of a model: what writes to it, what reads it through which norms, and an orthogonal change of
its channels, which no other part of the model sees.

Found from one forward pass, and tried with some of the channels on the model itself, which is put back to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..calibration.blocks import Call
from ..layers.dense_types import dense_shape, dense_type_of
from ..layers.expert_types import dense_stacks
from .find_folds import norm_offset, shared_weights
from .folds import input_weight, matrices, restored
from .recorded_reads import record_reads
from .rotation_core import rotation_matrix
from .scale_trials import ROUNDED_TOLERANCE, ROUNDED_TOLERANCE_IN_HALF, distance, outputs_of

# Channels of a trial: few in float32, and a quarter in half precision, where a small change drowns in rounding.
TRIAL_CHANNELS, TRIAL_FRACTION_IN_HALF = 8, 4
SHOWN_NAMES = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class ResidualStream:
    """Where the channels of the residual stream are in a model.

    Fields:
        width: channels.
        norms: of each norm layer that reads it what it adds to its weight, 0 or 1.
        readers: the names of what reads each norm layer.
        writers: names of the layers, and fused weights, whose outputs are added to it.
        embeddings: names of the embeddings that it begins with.
        keeps_mean: whether a norm subtracts the mean over the channels, which a change of them then has to keep.
    """

    width: int
    norms: Mapping[str, float]
    readers: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    embeddings: tuple[str, ...]
    keeps_mean: bool

    @torch.no_grad()
    def rotate(self, model: nn.Module, rotation: Tensor, channels: slice = slice(None)) -> None:
        """Let the stream hold ``x @ rotation`` where it held ``x``; in float64, each tensor rounded once.

        The gains of its norms move into what reads them. ``rotation`` (n, n) may be of some ``channels`` only.
        """
        self.rotate_writers(model, rotation, channels)
        for name, offset in self.norms.items():
            norm: Any = model.get_submodule(name)
            weight = norm.weight.detach()[channels]
            gain = weight.double() + offset
            turn = rotation.to(weight.device)
            for reader in self.readers[name]:
                for columns in matrices(input_weight(model, reader)[..., channels]):
                    columns.copy_((columns.double() * gain.to(columns.device)) @ turn.to(columns.device))
            if getattr(norm, "bias", None) is not None:
                bias = norm.bias.detach()[channels]
                bias.copy_(torch.where(gain == 0, 0, bias.double() / gain) @ turn)
            weight.fill_(1 - offset)

    @torch.no_grad()
    def rotate_writers(self, model: nn.Module, rotation: Tensor, channels: slice = slice(None)) -> None:
        """The part of :meth:`rotate` that changes what is written to the stream."""
        for tensor in self._written(model, channels):
            for part in matrices(tensor):
                part.copy_(part.double() @ rotation.to(part.device))

    @torch.no_grad()
    def reorder(self, model: nn.Module, order: Tensor) -> None:
        """Let channel ``i`` of the stream be the one that was ``order[i]``; nothing is rounded, gains stay gains."""
        for tensor in self._written(model, slice(None)):
            for part in matrices(tensor):
                part.copy_(part[..., order.to(part.device)])
        for name, readers in self.readers.items():
            for parameter in model.get_submodule(name).parameters():
                parameter.copy_(parameter[order.to(parameter.device)])
            for reader in readers:
                for columns in matrices(input_weight(model, reader)):
                    columns.copy_(columns[:, order.to(columns.device)])

    def tensors(self, model: nn.Module, channels: slice) -> list[Tensor]:
        """All that :meth:`rotate` changes for ``channels``."""
        found = list(self._written(model, channels))
        for name, readers in self.readers.items():
            found += [tensor.detach()[channels] for tensor in model.get_submodule(name).parameters()]
            found += [input_weight(model, reader)[..., channels] for reader in readers]
        return found

    def _written(self, model: nn.Module, channels: slice) -> Iterator[Tensor]:
        """What holds channels of the stream along its last axis: views of the model's tensors."""
        for name in self.embeddings:
            embedding: Any = model.get_submodule(name)
            yield embedding.weight.detach()[:, channels]
        for name in self.writers:
            weight = input_weight(model, name)
            yield weight[..., channels, :].transpose(-1, -2)
            module = _module_at(model, name)
            bias = None if module is None else getattr(module, "bias", None)
            if bias is not None:
                yield bias.detach()[channels]


def find_residual_stream(model: nn.Module, call: Call) -> ResidualStream:
    """The residual stream of ``model``, which is the same to the bit afterwards.

    Raises:
        ValueError: its structure is not known, or does not allow a rotation; names the class and the part.
    """
    stream, gains = _proposed(model, call)
    n_channels, tolerance = min(stream.width, TRIAL_CHANNELS), ROUNDED_TOLERANCE
    is_half = any(torch.finfo(tensor.dtype).bits < 32 for tensor in stream.tensors(model, slice(None)))
    if is_half:
        n_channels, tolerance = max(n_channels, stream.width // TRIAL_FRACTION_IN_HALF), ROUNDED_TOLERANCE_IN_HALF
    in_the_way = (
        f"{gains[0]} has a gain for each channel, and no linear layer behind it that could take it"
        if gains
        else "something other than norm layers and the linear layers behind them reads the residual stream"
    )
    if gains and is_half:  # where a trial would not show a gain that is nearly even
        _refuse(model, f"{in_the_way}, unless it is none of the stream's, which a trial in float32 shows")
    # Evenly spread: neighbours may be alike, as in sinusoidal positions, and a rotation of them next to nothing.
    channels = slice(None, None, stream.width // n_channels)
    n_channels = len(range(*channels.indices(stream.width)))
    turn = rotation_matrix(n_channels, use_hadamard=False, keeps_mean=stream.keeps_mean, seed=1)
    before = outputs_of(model, call)
    with restored(stream.tensors(model, channels)):
        stream.rotate_writers(model, turn, channels)
        half = distance(outputs_of(model, call), before)
    with restored(stream.tensors(model, channels)):
        stream.rotate(model, turn, channels)
        left = distance(outputs_of(model, call), before)
    if not half > 0 or not left <= tolerance * half:
        _refuse(model, in_the_way)
    return stream


def _proposed(model: nn.Module, call: Call) -> tuple[ResidualStream, list[str]]:
    """What the names and sizes of one pass suggest, and the norms of that width whose gain nothing could take."""
    recorded = record_reads(model, call)
    tokens = embeddings_of(model)
    if not isinstance(tokens, nn.Embedding):
        _refuse(model, "its input embeddings are not known")
    width = tokens.weight.shape[1]
    norms: dict[str, float] = {}
    uneven: list[str] = []
    for name, readers in recorded.readers.items():
        module: Any = model.get_submodule(name)
        if module.weight.numel() != width:
            continue
        offset = norm_offset(module)
        gain = module.weight.detach().double() + (offset or 0)
        if not readers and not torch.allclose(gain, gain.mean(), rtol=1e-6):
            uneven.append(name)
        if readers and offset is None:
            _refuse(model, f"{name} is a norm layer of another kind")
        if readers:
            bias = getattr(module, "bias", None)
            if bias is not None and bool(((gain == 0) & (bias.detach() != 0)).any()):
                _refuse(model, f"{name} has channels with a bias and no gain")
            norms[name] = float(offset or 0)
    readers_of = {name: tuple(recorded.readers[name]) for name in norms}
    reading = {reader for readers in readers_of.values() for reader in readers}
    writers = [
        name
        for name in recorded.layers
        if name not in reading and _module_at(model, name) is not None and dense_shape(model, name)[0] == width
    ]
    # All fused weights of an experts module run with its first.
    modules = {name.rpartition(".")[0] for name in recorded.layers}
    stacks = {name for name, _, _ in dense_stacks(model) if name.rpartition(".")[0] in modules}
    ran = {*recorded.layers, *stacks}
    writers += [name for name in _of_width(model, width) if name in stacks - reading]
    embeddings = [name for name in recorded.layers if isinstance(_submodule(model, name), nn.Embedding)]
    embeddings = [name for name in embeddings if name in _of_width(model, width)]
    if unfit := sorted((shared_weights(model) | recorded.ambiguous) & {*reading, *writers, *embeddings}):
        _refuse(model, f"{', '.join(unfit[:SHOWN_NAMES])} have a weight that is used in more than one place")
    # Image features, for example, are written to it by a projector that no text reaches.
    if unreached := [name for name in _of_width(model, width) if name not in ran]:
        _refuse(
            model,
            f"{', '.join(unreached[:SHOWN_NAMES])} may write to it, and the data does not reach it; give calibration= "
            "with batches that do",
        )
    if not norms or not writers:
        _refuse(model, "no norm layers that read it, or no layers that write to it, were found")
    stream = ResidualStream(
        width=width,
        norms=norms,
        readers=readers_of,
        writers=tuple(writers),
        embeddings=tuple(embeddings),
        keeps_mean=any(_subtracts_mean(model.get_submodule(name)) for name in norms),
    )
    return stream, uneven


def embeddings_of(model: Any) -> nn.Module | None:
    """What embeds the tokens; None where the model does not say."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _of_width(model: nn.Module, width: int) -> list[str]:
    """Names of the embeddings, dense layers and fused weights that give vectors of so many channels."""
    found = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Embedding) and module.weight.shape[1] == width)
        or (dense_type_of(module) is not None and dense_shape(model, name)[0] == width)
    ]
    return found + [name for name, module, entry in dense_stacks(model) if entry.shape(module)[1] == width]


def _module_at(model: nn.Module, name: str) -> nn.Module | None:
    """The dense module ``name``; None for a fused weight, or a module of another type."""
    module = _submodule(model, name)
    return None if module is None or dense_type_of(module) is None else module


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # a fused weight
        return None


@torch.no_grad()
def _subtracts_mean(module: Any) -> bool:
    x = torch.randn(1, module.weight.numel(), generator=torch.Generator().manual_seed(0))
    x = x.to(module.weight.device, module.weight.dtype)
    plain, moved = module.forward(x).float(), module.forward(x + 8).float()
    return bool((plain - moved).norm() < 0.1 * plain.norm())


def _refuse(model: nn.Module, reason: str) -> NoReturn:
    raise ValueError(
        f"the residual stream of {type(model).__name__} cannot be rotated: {reason}. Leave the "
        "transform out, or give it residual=False: Rotation(residual=False) rotates the heads only. The weights were "
        "not changed."
    )
