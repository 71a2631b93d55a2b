"""Checksums of what ``save_pretrained`` writes, and their check before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..formats.checksums import (
    SWITCH,
    ChecksumSource,
    are_checksums_used,
    checksums,
    find_damage,
    to_metadata,
)
from ..layers.codes_parameter import is_sharded

# Damaged tensors that an error message names.
_SHOWN_TENSORS = 5


def checksum_metadata(model: PreTrainedModel, state: Mapping[str, Any]) -> dict[str, str]:
    """Metadata with the checksum of each tensor that ``save_pretrained`` will write, under the names in the file.

    ``state`` are the tensors of ``model`` that will be written, under the names in the model.

    Of the active adapter's tensors if ``model`` carries adapters, since it saves those alone. Nothing where checksums
    are switched off, or where the tensors are not all here: sharded, or on the meta device.
    """
    if not are_checksums_used():
        return {}
    if getattr(model, "_hf_peft_config_loaded", False):
        state = model.get_adapter_state_dict()
        if any(tensor.is_meta or is_sharded(tensor) for tensor in state.values()):
            return {}
        own_names = checksums(state)
        return to_metadata({f"base_model.model.{name}": value for name, value in own_names.items()}, own_names)
    state = {
        name: tensor
        for name, tensor in state.items()
        if name not in (model._keys_to_ignore_on_save or ()) and isinstance(tensor, Tensor)
    }
    if any(tensor.is_meta or is_sharded(tensor) for tensor in state.values()):
        return {}
    state = remove_tied_weights_from_state_dict(state, model)
    own_names = checksums(state)
    converted = revert_weight_conversion(model, dict(state))
    # Most are the same tensors under the same or another name; only what was converted is read again.
    known = {_identity(tensor): own_names[name] for name, tensor in state.items()}
    renamed = {name: known[_identity(tensor)] for name, tensor in converted.items() if _identity(tensor) in known}
    rest = {name: tensor for name, tensor in converted.items() if name not in renamed}
    return to_metadata(renamed | checksums(rest), own_names)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def refuse_damage(files: Mapping[str, ChecksumSource], *, name: str) -> None:
    """Raise ValueError, with the first few damaged tensors, if the files carry checksums and anything differs.

    Args:
        files: opened, by path.
        name: what they are together, for the message.
    """
    damage = find_damage(files) if are_checksums_used() else []
    if damage:
        raise ValueError(
            f"{name} is damaged, or put together of several ({len(damage)} tensor(s) or file(s)):\n  "
            + "\n  ".join(map(str, damage[:_SHOWN_TENSORS]))
            + ".\nDownload or save it again; peft_quantlayers.verify_model(folder) lists them. If the files were "
            f"edited on purpose, {SWITCH}=1 loads them."
        )
