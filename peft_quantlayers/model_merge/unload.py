"""The end of a merge: what PEFT merges itself, and the base model without PEFT's wrapper."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft import LoraModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..layers import dequantize_model
from .active_adapters import set_active
from .prepared_merge import PreparedMerge


def merge_dense_layers(merge: PreparedMerge) -> None:
    """PEFT's own merge of LoRA on dense layers; undone if it fails. Other tuners' is a part of unloading them."""
    if not isinstance(merge.peft_model.base_model, LoraModel):
        return
    ours = {id(target.module) for target in merge.targets}
    others = [
        module
        for module in merge.peft_model.modules()
        if isinstance(module, LoraLayer) and id(module) not in ours and not module.merged
    ]
    try:
        with _without_already_merged_warning():
            cast(Any, merge.peft_model.base_model).merge_adapter(adapter_names=merge.names)
    except BaseException:
        for module in others:
            if module.merged:
                cast(Any, module).unmerge()
        raise


def unloaded(merge: PreparedMerge) -> nn.Module:
    """The base model without PEFT's wrapper, with the adapters merged; after an error PEFT's modules are in place."""
    peft_model, targets = merge.peft_model, merge.targets
    active, replaced = list(peft_model.active_adapters), dict[str, nn.Module]()
    try:
        set_active(peft_model, targets, merge.names)  # PEFT keeps the modules_to_save of active adapters
        for target in targets:
            if target.source.is_merged_by_owner:  # some of PEFT's tuners (OSF) would merge a second time
                parent = target.name.rpartition(".")[0]
                is_wrapped = isinstance(peft_model.get_submodule(parent), AuxiliaryTrainingWrapper)  # trained tokens
                name = parent if is_wrapped else target.name
                replaced[name] = peft_model.get_submodule(name)
                peft_model.set_submodule(name, target.source.current_base())
        with _without_already_merged_warning():
            model = peft_model.merge_and_unload(adapter_names=merge.names)
    except BaseException as error:
        for name, module in replaced.items():
            peft_model.set_submodule(name, module)
        set_active(peft_model, targets, active)
        if isinstance(error, NotImplementedError) and not str(error):
            kind = type(peft_model.base_model).__name__
            raise NotImplementedError(
                f"PEFT has no merge for adapters of {kind}. Keep them beside the base, with save_pretrained. The "
                "model is left as it was."
            ) from None
        raise
    return dequantize_model(model) if merge.strategy == "dense" else model


@contextmanager
def _without_already_merged_warning() -> Iterator[None]:
    """PEFT warns for every quantized layer, which is merged before its own merge visits all layers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged|Already following adapters were merged")
        yield
