"""Rotations R1 and R2: of the residual stream, and of each head's values; fused into the weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..arguments import check_choice, check_flag, check_integer
from ..calibration.blocks import Call
from .base import Surroundings, Transform
from .find_folds import find_folds
from .folds import Fold, restored
from .residual_stream import TOLERANCE, TOLERANCE_IN_HALF, embeddings_of, find_residual_stream
from .rotation_core import rotation_matrix
from .trial import distance, outputs_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Rotation(Transform):
    """Orthogonal changes of basis that spread large weights and inputs over all channels, fused into the weights.

    Nothing is added to the model's forward, and it computes what it did. Embeddings that share their weight with the
    output head are untied: the model then holds both, and says so in its config. Nothing is centred: models with
    LayerNorm get a rotation that keeps the mean.

    Fields:
        kind: "hadamard", with random signs, for sizes that have a Hadamard matrix, else a random one; or "random".
        residual: rotate the residual stream (R1), for which the gains of the norms move into the layers behind them.
        heads: rotate the values of each attention head (R2).
        seed: of the random numbers.

    Source: Ashkboos et al. 2024, "QuaRot"; Liu et al. 2024, "SpinQuant". Both subtract the mean of each embedding,
    which changes what a model with RMSNorm computes, and is left out here.
    """

    kind: Literal["hadamard", "random"] = "hadamard"
    residual: bool = True
    heads: bool = True
    seed: int = 0

    name: ClassVar[str] = "rotation"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("hadamard", "random"))
        check_flag("residual", self.residual)
        check_flag("heads", self.heads)
        check_integer("seed", self.seed, at_least=0, at_most=2**63 - 1)
        if not self.residual and not self.heads:
            raise ValueError("Rotation(residual=False, heads=False) rotates nothing; leave it out.")

    def apply(self, model: nn.Module, surroundings: Surroundings) -> None:
        heads = rotatable_heads(model, surroundings.call) if self.heads else []
        if self.residual:
            with untied_head(model):
                stream = find_residual_stream(model, surroundings.call)
                stream.rotate(model, self._matrix(stream.width, keeps_mean=stream.keeps_mean))
        elif not heads:
            raise ValueError(
                f"{type(model).__name__} has no attention whose values could be rotated: none was found in which they "
                "go straight into a linear layer. The model was not changed."
            )
        for fold in heads:
            rotate_heads(model, fold, self._matrix(fold.head_dim))
        logger.info("rotated %s%d attention(s)", "the residual stream and " if self.residual else "", len(heads))

    def _matrix(self, size: int, *, keeps_mean: bool = False) -> Tensor:
        return rotation_matrix(size, use_hadamard=self.kind == "hadamard", keeps_mean=keeps_mean, seed=self.seed)


@contextmanager
def untied_head(model: Any) -> Iterator[None]:
    """Give an output head that shares the embeddings' weight one of its own; tie it again if an error ends this."""
    get_head = getattr(model, "get_output_embeddings", None)
    head, tokens = None if get_head is None else get_head(), embeddings_of(model)
    if head is None or getattr(head, "weight", None) is not getattr(tokens, "weight", None):
        yield
        return
    shared, configs = head.weight, {id(each): each for each in (model.config, model.config.get_text_config())}
    before = {key: getattr(config, "tie_word_embeddings", None) for key, config in configs.items()}
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    for config in configs.values():
        config.tie_word_embeddings = False
    try:
        yield
    except BaseException:
        head.weight = shared
        for key, config in configs.items():
            config.tie_word_embeddings = before[key]
        raise
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)
    logger.warning(
        "the output head no longer shares its weight with the embeddings, which a rotation changes in another way: "
        "the model has %d more parameters, and tie_word_embeddings=False in its config.",
        shared.numel(),
    )


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


@torch.no_grad()
def _is_rotatable(model: nn.Module, call: Call, fold: Fold, before: list[Tensor]) -> bool:
    turn = rotation_matrix(fold.head_dim, use_hadamard=False, keeps_mean=False, seed=1)
    tensors = [*fold.source_tensors(model), *fold.reader_tensors(model)]
    with restored(tensors):
        rotate_heads(model, fold, turn, source_only=True)
        half = distance(outputs_of(model, call), before)
    with restored(tensors):
        rotate_heads(model, fold, turn)
        left = distance(outputs_of(model, call), before)
    is_half = min(torch.finfo(tensor.dtype).bits for tensor in tensors) < 32
    return half > 0 and left <= (TOLERANCE_IN_HALF if is_half else TOLERANCE) * half
