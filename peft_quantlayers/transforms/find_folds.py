"""Find the folds of a model: proposed from what one forward pass shows, kept if they leave the model's outputs alone.

No table of architectures. A norm and all that read it are one proposal; two linear layers of one module, of fitting
sizes, are another: the values and the output of an attention, the up and the down projection of a gated MLP. A
proposal is tried once for each kind of place (see :mod:`.trial`), so that a nonlinearity between, a reader that was
not seen, shared weights or a residual connection from behind the norm rule it out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.blocks import Call
from ..calibration.model_facts import text_config
from ..layers.dense_types import dense_shape, dense_type_of
from .folds import Fold, input_weight
from .recorded_reads import Recorded, record_reads
from .scale_trials import is_preserving, outputs_of

# Of the gain that a norm has at a weight of one, what rounding in half precision may add or take.
GAIN_TOLERANCE = 0.02


def find_folds(model: nn.Module, call: Call) -> list[Fold]:
    """The folds of ``model`` that ``call``, of a few tokens, reaches; the model is the same to the bit afterwards.

    Raises:
        ValueError: there are none; names the class of the model.
    """
    recorded = record_reads(model, call)
    before = outputs_of(model, call)
    shared = shared_weights(model)
    found = []
    for places in _by_kind(model, _proposals(model, recorded, shared)):
        # The first and the last of a kind stand for all: blocks of one class compute the same.
        ends = places if len(places) < 3 else [places[0], places[-1]]
        if all(is_preserving(model, call, fold, before) for fold in ends):
            found += places
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no place where a scale can move: in none does a norm layer feed linear "
            "layers only, or a linear layer another one without a nonlinearity between. Leave the transform out, or "
            "use Rotation where the model allows that. The model was not changed."
        )
    order = {name: position for position, name in enumerate(recorded.layers)}
    return sorted(_without_overlaps(found), key=lambda fold: order[fold.readers[0]])


def norm_offset(module: nn.Module) -> float | None:
    """What a norm layer adds to its weight to get the gain: 0 or 1; None for a norm of another kind.

    One that takes more than its input (a condition, a gate) is of another kind.
    """
    weight: Any = module.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.numel(), generator=generator).to(weight.device, weight.dtype)
    gains = []
    kept, bias = weight.detach().clone(), getattr(module, "bias", None)
    kept_bias = None if bias is None else bias.detach().clone()
    with torch.no_grad():
        if bias is not None:
            bias.zero_()
        try:
            for value in (0.0, 1.0):
                weight.fill_(value)
                gains.append(float(module.forward(x).double().norm() / x.double().norm()))
        except (TypeError, AttributeError, RuntimeError):
            return None
        finally:
            weight.copy_(kept)
            if bias is not None and kept_bias is not None:
                bias.copy_(kept_bias)
    at_zero, at_one = gains
    if at_zero == 0 and at_one > 0:
        return 0.0
    return 1.0 if at_zero > 0 and abs(at_one / at_zero - 2) < GAIN_TOLERANCE else None


def shared_weights(model: nn.Module) -> set[str]:
    """Names of the modules, and fused weights, whose weight has another name too."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name.removesuffix(".weight") for each in names.values() if len(each) > 1 for name in each}


def _proposals(model: nn.Module, recorded: Recorded, shared: set[str]) -> Iterator[Fold]:
    for source, readers in recorded.readers.items():
        unfit = set(readers) & (recorded.ambiguous | shared)
        if not readers or unfit or source in shared:
            continue
        module: Any = model.get_submodule(source)
        n_channels = module.weight.numel()
        offset = norm_offset(module)
        if offset is not None and all(input_weight(model, name).shape[-1] == n_channels for name in readers):
            yield Fold(kind="norm", source=source, readers=tuple(readers), n_channels=n_channels, norm_offset=offset)
    dense = [name for name in recorded.layers if name not in shared and is_dense(model, name)]
    for position, reader in enumerate(dense):
        for source in dense[:position]:
            if source.rpartition(".")[0] == reader.rpartition(".")[0]:
                yield from _linear_folds(model, source, reader)


def is_dense(model: nn.Module, name: str) -> bool:
    """Whether the layer ``name`` is a module that computes ``x @ weight.T + bias``."""
    try:
        return dense_type_of(model.get_submodule(name)) is not None
    except AttributeError:  # a fused weight
        return False


def _linear_folds(model: nn.Module, source: str, reader: str) -> Iterator[Fold]:
    """The ways in which outputs of ``source`` may become the inputs of ``reader``, so far as their sizes tell."""
    (n_out, _), (_, n_in) = dense_shape(model, source), dense_shape(model, reader)
    named: dict[str, Any] = {"kind": "linear", "source": source, "readers": (reader,)}
    size = _head_dim(model, source)
    head_dim = size if n_in % size == 0 else 0
    if n_out == n_in:
        yield Fold(**named, n_channels=n_in, head_dim=head_dim)
    if n_out == 2 * n_in:  # gate and up in one
        yield Fold(**named, n_channels=n_in, rows=torch.arange(n_in, n_out))
        yield Fold(**named, n_channels=n_in, rows=torch.arange(n_in))
    if not head_dim:
        return
    if n_out < n_in and n_in % n_out == 0 and n_out % head_dim == 0:
        yield Fold(**named, n_channels=n_out, index=_repeated(n_out, n_in, head_dim), head_dim=head_dim)
    n_values = (n_out - n_in) // 2
    if n_values > 0 and n_values % head_dim == 0 and n_in % n_values == 0:  # queries, keys and values in one
        fused = named | {"n_channels": n_values, "index": _repeated(n_values, n_in, head_dim), "head_dim": head_dim}
        yield Fold(**fused, rows=torch.arange(n_out - n_values, n_out))
        per_head = torch.arange(n_out).view(n_values // head_dim, -1, head_dim)
        if n_values > head_dim:  # with one head both are the same
            yield Fold(**fused, rows=per_head[:, -1].reshape(-1))


def _repeated(n_values: int, n_in: int, head_dim: int) -> Tensor | None:
    """The channel of the values that each input of an output projection is made of; None where it is the same."""
    if n_values == n_in:
        return None
    heads = torch.arange(n_values).view(-1, head_dim)
    return heads.repeat_interleave(n_in // n_values, dim=0).reshape(-1)


def _head_dim(model: nn.Module, name: str) -> int:
    """Channels of one head in the module that holds the layer ``name``; a size that fits nothing where unknown."""
    parent = model.get_submodule(name.rpartition(".")[0])
    config = text_config(model)
    n_heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "hidden_size", None)
    from_sizes = width // n_heads if isinstance(width, int) and isinstance(n_heads, int) and n_heads else None
    known = (getattr(parent, "head_dim", None), getattr(config, "head_dim", None), from_sizes)
    return next((size for size in known if isinstance(size, int) and size > 0), 2**31)


def _by_kind(model: nn.Module, folds: Iterator[Fold]) -> list[list[Fold]]:
    groups: dict[tuple, list[Fold]] = {}
    for fold in folds:
        groups.setdefault(kind_of_place(model, fold), []).append(fold)
    return list(groups.values())


def kind_of_place(model: nn.Module, fold: Fold) -> tuple:
    """What folds in the same place of blocks of one class have in common."""
    names = [fold.source, *fold.readers]
    indexed = [".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names]
    rows = None if fold.rows is None else tuple(fold.rows[:: max(1, fold.n_channels // 8)].tolist())
    parents = tuple(type(parent).__name__ for name in names for parent in _parents(model, name))
    return (fold.kind, tuple(indexed), fold.n_channels, fold.norm_offset, rows, parents)


def _parents(model: nn.Module, name: str) -> Iterator[nn.Module]:
    parts = name.split(".")
    for end in range(1, len(parts)):
        yield model.get_submodule(".".join(parts[:end]))


def _without_overlaps(folds: list[Fold]) -> list[Fold]:
    """One fold for each source and set of rows, the first that was found."""
    taken: set[tuple] = set()
    kept = []
    for fold in folds:
        key = (fold.source, fold.readers)
        if key not in taken:
            taken.add(key)
            kept.append(fold)
    return kept
