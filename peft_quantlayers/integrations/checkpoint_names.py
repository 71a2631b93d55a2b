"""Names in a checkpoint and names in a model, translated as transformers itself does it. The only place that does.

transformers 5 reads and writes many models under other names than those of their modules: renamings of the class, of
the classes inside it, and the base model's prefix, which may be there or not. A quantized layer is found by the same
rules, whether its name comes from a file or from ``config.json``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

from ..layers.dense_types import dense_names
from ..layers.quantized_layers import quantized_layers


class CheckpointNames:
    """Where the tensors of a checkpoint belong in ``model``, whose layers may still be dense, or quantized.

    ``layers`` are more names under which the model has such layers, for example those that adapters wrap.
    """

    def __init__(self, model: nn.Module, *, layers: Iterable[str] = ()) -> None:
        is_known = isinstance(model, PreTrainedModel)
        conversions: list[Any] = get_model_conversion_mapping(model) if is_known else []
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._prefix = getattr(model, "base_model_prefix", "") or None
        self._is_headless = getattr(model, "base_model", model) is model
        # What a class takes from checkpoints of another one that has more modules.
        self._ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        self._layers = {*dense_names(model), *quantized_layers(model), *layers}
        self._places = _Places(model.state_dict(), self._layers)

    def parameters(self, keys: Iterable[str]) -> dict[str, str]:
        """The parameter or buffer of the model for each key of a checkpoint; keys that have none are left out.

        A tensor of a layer that is or can be quantized has one, whatever its own name is.
        """
        renamed = self.renamed(keys)
        found = {key: self._place(name) or self._place(key) for key, name in renamed.items()}
        return {key: parameter for key, parameter in found.items() if parameter is not None}

    def renamed(self, keys: Iterable[str]) -> dict[str, str]:
        """Each key as transformers compares it with its conversions: the base model's prefix is not looked at."""
        renamings = copy.deepcopy(self._renamings)  # some remember the keys that they have seen
        return {key: rename_source_key(key, renamings, [])[0] for key in sorted(keys, key=dot_natural_key)}

    def modules(self, stored_names: Iterable[str]) -> dict[str, str]:
        """The layer of the model for each stored name of a quantized layer; what the model does without is left out.

        Raises:
            ValueError: the model has no dense layer of that name, or two names mean the same one.
        """
        stored_names = list(stored_names)
        parameters = self.parameters(f"{name}.weight" for name in stored_names if name not in self._layers)
        modules = {}
        for stored_name in stored_names:
            parameter = parameters.get(f"{stored_name}.weight", "")
            name = stored_name if stored_name in self._layers else parameter.removesuffix(".weight")
            if name in self._layers:
                modules[stored_name] = name
            elif re.search(r"\.experts\.\d+\.", stored_name):
                raise ValueError(
                    f"{stored_name}: the checkpoint holds each expert of a mixture of experts as quantized layers of "
                    "its own. transformers 5 keeps all experts of a block in one tensor, and says for this model not "
                    "where this layer belongs in it. Use the checkpoint with transformers 4 and the package that "
                    "wrote it, or quantize the float model with peft_quantlayers."
                )
            elif not self._is_headless and not any(p.search(stored_name) for p in self._ignored):
                raise ValueError(
                    f"the checkpoint has a quantized module {stored_name!r}, and the model has no linear layer of "
                    "that name. The two do not belong together, or tensors were renamed (key_mapping does not reach "
                    "quantized layers)."
                )
        if stored_names and not modules:
            raise ValueError("the checkpoint has quantized modules, and the model has none of them.")
        twice = _first_duplicate(modules)
        if twice is not None:
            raise ValueError(f"the checkpoint has two quantized layers for one module: {twice[0]!r} and {twice[1]!r}.")
        return modules

    def _place(self, name: str) -> str | None:
        places: Any = self._places
        name = rename_source_key(name, [], [], self._prefix, places)[0]
        return name if places.get(name) else None


class _Places:
    """The names of all parameters, and of anything that a layer may hold; looked up as transformers does it."""

    def __init__(self, names: Iterable[str], layers: Iterable[str]) -> None:
        self._names, self._layers = set(names), set(layers)

    def get(self, name: str) -> bool | None:
        module = name.rpartition(".")[0]
        return name in self._names or bool({module, module.removesuffix(".branch")} & self._layers) or None


def _first_duplicate(names: Mapping[str, str]) -> tuple[str, str] | None:
    seen: dict[str, str] = {}
    for stored_name, name in names.items():
        if name in seen:
            return seen[name], stored_name
        seen[name] = stored_name
    return None
