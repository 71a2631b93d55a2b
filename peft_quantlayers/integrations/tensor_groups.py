"""Which tensors of a float checkpoint's files make which parameters of a model, by transformers' own rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from .checkpoint_headers import CheckpointFiles


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of the files that make one parameter, or several, together.

    Fields:
        keys: names in the files, in the order in which transformers reads them.
        parameters: the names in the model of what they make.
        n_bytes: of the tensors in the files.
    """

    keys: tuple[str, ...]
    parameters: tuple[str, ...]
    n_bytes: int


@dataclass(frozen=True)
class FoundGroups:
    """What a model takes from the files.

    Fields:
        groups: all of it, in the order in which transformers reads it.
        unexpected: names in the files that the model has no place for.
        conversions: transformers' renamings and converters that had something to do.
    """

    groups: list[TensorGroup]
    unexpected: list[str]
    conversions: list[Any]


def find_groups(model: PreTrainedModel, files: CheckpointFiles, *, where: str) -> FoundGroups:
    """Which tensors go where. ValueError if one has another shape than its parameter; names it, and the files by
    ``where``."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state: dict[str, Any] = model.state_dict()
    prefix = model.base_model_prefix
    keys: dict[str, list[str]] = {}
    targets: dict[str, tuple[str, ...]] = {}
    unexpected = []
    for key in sorted(files.headers, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            unexpected.append(key)
            continue
        if pattern is None:
            check_shape(where, name, files.headers[key].shape, state[name].shape)
        keys.setdefault(name, []).append(key)
        patterns = of_pattern[pattern].target_patterns if pattern is not None else [""]
        made = (name.replace(patterns[0], other) for other in patterns)
        targets[name] = tuple(dict.fromkeys([name, *(target for target in made if target in state)]))
    groups = [
        TensorGroup(tuple(found), targets[name], sum(files.n_bytes(key) for key in found))
        for name, found in keys.items()
    ]
    return FoundGroups(groups, unexpected, [entry for entry in conversions if entry.was_used()])


def check_shape(where: str, name: str, stored: Sequence[int], wanted: Sequence[int]) -> None:
    """ValueError if a tensor in the files has another shape than its parameter."""
    if tuple(stored) != tuple(wanted):
        raise ValueError(
            f"{where}: {name} has the shape {tuple(stored)} in the files, and config.json asks for "
            f"{tuple(wanted)}. They do not belong together."
        )


def find_tied(model: PreTrainedModel, groups: Sequence[TensorGroup], files: CheckpointFiles) -> dict[str, str]:
    """What ``tie_weights`` would tie after loading: all that is declared, but for what differs in the files."""
    key_of = {name: group.keys for group in groups for name in group.parameters}
    tied: dict[str, str] = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        stored, other = key_of.get(target), key_of.get(source)
        if stored is None or other is None or _are_equal(files, stored, other):
            tied[target] = source
            if stored is not None:
                key_of[source] = stored  # the first that is there stands for all
    return tied


def without_copies(groups: Sequence[TensorGroup], tied: dict[str, str]) -> list[TensorGroup]:
    """The groups without those that make only what an earlier one makes, tied to it."""
    made: set[str] = set()
    kept = []
    for group in groups:
        names = {tied.get(name, name) for name in group.parameters}
        if not names <= made:
            kept.append(group)
        made |= names
    return kept


def _are_equal(files: CheckpointFiles, keys: Sequence[str], others: Sequence[str]) -> bool:
    return len(keys) == len(others) == 1 and files.are_equal(keys[0], others[0])
