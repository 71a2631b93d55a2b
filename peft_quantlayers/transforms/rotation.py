"""Rotations R1 and R2: of the residual stream, and of each head's values; fused into the weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..arguments import check_choice, check_flag, check_integer
from ..calibration.blocks import Call
from .cayley import TrainedRotation
from .find_folds import find_folds
from .folds import Fold
from .learned_rotation import RotationsToLearn, learn
from .residual_stream import embeddings_of, find_residual_stream
from .rotation_core import rotation_matrix
from .scale_trials import changes_nothing, outputs_of
from .transform_base import Surroundings, Transform

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Rotation(Transform):
    """Orthogonal changes of basis that spread large weights and inputs over all channels, fused into the weights.

    Nothing is added to the model's forward, and it computes what it did. Embeddings that share their weight with the
    output head are untied: the model then holds both, and says so in its config. Nothing is centred: models with
    LayerNorm get a rotation that keeps the mean.

    Fields:
        kind: "hadamard", with random signs, for sizes that have a Hadamard matrix, else a random one; "random"; or
            "learned" on calibration data, for the rounding to HQQ's grid to change the predictions least.
        residual: rotate the residual stream (R1), for which the gains of the norms move into the layers behind them.
        heads: rotate the values of each attention head (R2).
        seed: of the random numbers.
        start: of a learned rotation: one of the other kinds, or "identity".
        steps: of its training, each on a window of 128 tokens.

    Source: Ashkboos et al. 2024, "QuaRot"; Liu et al. 2024, "SpinQuant", where they are learned. Both subtract the
    mean of each embedding, which changes what a model with RMSNorm computes, and is left out here.
    """

    kind: Literal["hadamard", "random", "learned"] = "hadamard"
    residual: bool = True
    heads: bool = True
    seed: int = 0
    start: Literal["hadamard", "random", "identity"] = "identity"
    steps: int = 40

    name: ClassVar[str] = "rotation"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("hadamard", "random", "learned"))
        check_choice("start", self.start, ("hadamard", "random", "identity"))
        check_integer("steps", self.steps, at_least=1, at_most=100_000)
        check_flag("residual", self.residual)
        check_flag("heads", self.heads)
        check_integer("seed", self.seed, at_least=0, at_most=2**63 - 1)
        if not self.residual and not self.heads:
            raise ValueError("Rotation(residual=False, heads=False) rotates nothing; leave it out.")

    @property
    def needs_calibration(self) -> bool:
        return self.kind == "learned"

    @property
    def needs_config(self) -> bool:
        return self.kind == "learned"

    def to_dict(self) -> dict[str, Any]:
        options = super().to_dict()
        if self.kind != "learned":
            del options["start"], options["steps"]
        return options

    def apply(self, model: nn.Module, surroundings: Surroundings) -> None:
        heads = rotatable_heads(model, surroundings.call) if self.heads else []
        if not self.residual and not heads:
            raise ValueError(
                f"{type(model).__name__} has no attention whose values could be rotated: none was found in which they "
                "go straight into a linear layer. The model was not changed."
            )
        with untied_head(model) if self.residual else nullcontext():
            stream = find_residual_stream(model, surroundings.call) if self.residual else None
            rotations = RotationsToLearn(
                stream=stream,
                residual=None if stream is None else self._rotation(stream.width, keeps_mean=stream.keeps_mean),
                heads=heads,
                of_heads=[self._rotation(fold.head_dim) for fold in heads],
            )
            if self.kind == "learned":
                learn(model, rotations, surroundings, steps=self.steps)
            if stream is not None and rotations.residual is not None:
                stream.rotate(model, rotations.residual.matrix())
        for fold, rotation in zip(heads, rotations.of_heads, strict=True):
            rotate_heads(model, fold, rotation.matrix())
        logger.info("rotated %s%d attention(s)", "the residual stream and " if self.residual else "", len(heads))

    def _rotation(self, size: int, *, keeps_mean: bool = False) -> TrainedRotation:
        kind = self.start if self.kind == "learned" else self.kind
        if kind == "identity":
            start = torch.eye(size, dtype=torch.float64)
        else:
            start = rotation_matrix(size, use_hadamard=kind == "hadamard", keeps_mean=keeps_mean, seed=self.seed)
        return TrainedRotation(start, keeps_mean=keeps_mean)


@contextmanager
def untied_head(model: Any) -> Iterator[None]:
    """Give an output head that shares the embeddings' weight one of its own; tie it again if an error ends this."""
    tie = separate_head(model)
    if tie is None:
        yield
        return
    try:
        yield
    except BaseException:
        tie()
        raise
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)
    logger.warning(
        "the output head no longer shares its weight with the embeddings, which a rotation changes in another way: "
        "the model has %d more parameters, and tie_word_embeddings=False in its config.",
        model.get_output_embeddings().weight.numel(),
    )


def separate_head(model: Any) -> Callable[[], None] | None:
    """Give an output head that shares the embeddings' weight one of its own, and return what ties it again.

    None where it has its own already.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head, tokens = None if get_head is None else get_head(), embeddings_of(model)
    if head is None or getattr(head, "weight", None) is not getattr(tokens, "weight", None):
        return None
    shared, configs = head.weight, {id(each): each for each in (model.config, model.config.get_text_config())}
    before = {key: getattr(config, "tie_word_embeddings", None) for key, config in configs.items()}
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    for config in configs.values():
        config.tie_word_embeddings = False

    def tie() -> None:
        head.weight = shared
        for key, config in configs.items():
            config.tie_word_embeddings = before[key]

    return tie


def rotatable_heads(model: nn.Module, call: Call) -> list[Fold]:
    """The folds of values into an attention's output that a rotation within each head leaves alone too.

    Fewer than the folds of scales: a gate for each channel commutes with scales only.
    """
    try:
        folds = [fold for fold in find_folds(model, call) if fold.head_dim > 1]
    except ValueError:
        return []
    kinds: dict[tuple, list[Fold]] = {}
    for fold in folds:
        parent = model.get_submodule(fold.source.rpartition(".")[0])
        kinds.setdefault((type(parent), fold.n_channels, fold.source.rpartition(".")[2]), []).append(fold)
    before = outputs_of(model, call)
    found = []
    for same in kinds.values():
        ends = same if len(same) < 3 else [same[0], same[-1]]
        if all(_is_rotatable(model, call, fold, before) for fold in ends):
            found += same
    return found


@torch.no_grad()
def rotate_heads(model: nn.Module, fold: Fold, rotation: Tensor, *, source_only: bool = False) -> None:
    """Let each head's values be ``v @ rotation`` where they were ``v``; in float64, each tensor rounded once."""
    for tensor in fold.source_tensors(model):
        turn = rotation.t().to(tensor.device)
        rows = slice(None) if fold.rows is None else fold.rows.to(tensor.device)
        heads = tensor[rows].double().reshape(-1, fold.head_dim, *tensor.shape[1:])
        turned = torch.einsum("ij,hj...->hi...", turn, heads)
        tensor[rows] = turned.reshape(-1, *tensor.shape[1:]).to(tensor.dtype)
    if not source_only:
        for weight in fold.reader_tensors(model):
            heads = weight.double().unflatten(-1, (-1, fold.head_dim))
            weight.copy_((heads @ rotation.to(weight.device)).flatten(-2))


def _is_rotatable(model: nn.Module, call: Call, fold: Fold, before: list[Tensor]) -> bool:
    turn = rotation_matrix(fold.head_dim, use_hadamard=False, keeps_mean=False, seed=1)
    return changes_nothing(
        model,
        call,
        [*fold.source_tensors(model), *fold.reader_tensors(model)],
        half=lambda: rotate_heads(model, fold, turn, source_only=True),
        whole=lambda: rotate_heads(model, fold, turn),
        before=before,
    )
