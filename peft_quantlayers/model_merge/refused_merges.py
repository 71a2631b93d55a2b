"""What ``merge_back`` refuses, before and during the merge. Each error names an alternative. Changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import LoraModel, PeftMixedModel, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from ..arguments import check_choice, check_integer, check_model, check_names
from ..calibration import Calibration
from ..integrations.private_peft import tied_target_modules
from ..layers.placement import check_weights_are_here
from ..merging.strategies import STRATEGIES, Strategy
from ..methods import get_method
from .merge_targets import MergeTarget


def refuse_other_models(peft_model: Any) -> None:
    """Raise unless it is a PeftModel whose adapters change weights."""
    check_model("merge_back", peft_model)
    if isinstance(peft_model, PeftMixedModel):
        raise TypeError(
            "merge_back takes a PeftModel, got a PeftMixedModel, whose adapters are of several kinds. Merge it with "
            "its own merge_and_unload(), which requantizes."
        )
    if not isinstance(peft_model, PeftModel):
        raise TypeError(
            f"merge_back takes a PeftModel, got {type(peft_model).__name__}. For adapters added with "
            "model.add_adapter(...) save them with model.save_pretrained(folder) and load them with "
            "PeftModel.from_pretrained(base, folder)."
        )
    if not isinstance(peft_model.base_model, BaseTuner):
        kind = str(getattr(peft_model.active_peft_config.peft_type, "value", "?"))
        raise TypeError(
            f"{kind} changes the model's inputs and no weight: there is nothing to merge. Save it with its own "
            "save_pretrained and load it onto the base."
        )
    if not any(
        isinstance(cast(object, module), (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in peft_model.modules()
    ):
        raise ValueError(
            "the model has no adapter any more: they were already merged and removed. Use the model that the merge "
            "returned, or load base and adapter again."
        )


def refuse_arguments(strategy: Strategy, calibration: Any, tune_epochs: int, *, has_budget: bool) -> None:
    """Raise if an argument of the merge is unknown, or if two of them contradict each other."""
    check_choice("strategy", strategy, tuple(STRATEGIES), remedy="The model is left as it was.")
    check_integer("tune_epochs", tune_epochs, at_least=0, at_most=10_000)
    if tune_epochs and not STRATEGIES[strategy].adds_noise:
        raise ValueError(
            f"tune_epochs={tune_epochs} makes up for what rounding loses, and strategy={strategy!r} rounds nothing. "
            "Leave it out. The model is left as it was."
        )
    if tune_epochs and calibration is None:
        raise ValueError(
            f"tune_epochs={tune_epochs} needs calibration=, on which the merged model learns to predict what the "
            "unmerged one does. The model is left as it was."
        )
    if calibration is None and strategy == "calibrated":
        raise ValueError(
            'strategy="calibrated" needs calibration=: some text like that of the adapter\'s task. Without any, use '
            '"requantize", or "keep" for plain LoRA. The model is left as it was.'
        )
    if calibration is not None and not STRATEGIES[strategy].data_rules and not (tune_epochs or has_budget):
        raise ValueError(
            f'strategy={strategy!r} takes no calibration data; "calibrated" and "append" do, and any that rounds with '
            "tune_epochs=. The model is left as it was."
        )
    if isinstance(calibration, Calibration) and calibration.resume_folder is not None:
        raise ValueError(
            "resume_folder is for quantize_model: an interrupted merge starts from the beginning. Remove it from the "
            "Calibration. The model is left as it was."
        )


def refuse_weights_elsewhere(peft_model: PeftModel) -> None:
    """Raise unless this process has all weights: a merge reads them, and writes them all or none."""
    check_weights_are_here(
        peft_model,
        "merge_back",
        if_offloaded=" PEFT's merge_and_unload() merges an offloaded model layer by layer.",
        if_sharded="Save the adapter with save_pretrained, and merge it in one process: load the quantized folder "
        "without distributed_config, the adapter with PeftModel.from_pretrained, and call merge_back.",
    )


def checked_names(peft_model: PeftModel, adapters: list[str] | None) -> list[str]:
    """The adapters to merge: ``adapters``, or the active ones."""
    check_names("adapters", adapters, "default")
    names = list(peft_model.active_adapters) if adapters is None else list(adapters)
    unknown = [name for name in names if name not in peft_model.peft_config]
    if unknown or not names:
        said = f"no such adapter {unknown}" if unknown else "no adapter to merge"
        raise ValueError(f"adapters={adapters!r}: {said}; the model has {sorted(peft_model.peft_config)}.")
    if len(set(names)) < len(names):
        raise ValueError(f"adapters={names}: an adapter is merged once. Name each one once.")
    tuners = (module for module in peft_model.modules() if isinstance(cast(object, module), BaseTunerLayer))
    others = {name for tuner in tuners for name in cast(Any, tuner).merged_adapters} - set(names)
    if others:
        raise ValueError(
            f"{sorted(others)} are merged already, and {names} would be merged without them. Name them too, "
            "or undo their merge with unmerge_adapter() first."
        )
    return names


def refuse_broken_adapters(peft_model: PeftModel, names: list[str]) -> None:
    """Raise, naming the parameter, if one of those that the adapters trained is not finite."""
    trains_biases = any(getattr(peft_model.peft_config[name], "bias", "none") != "none" for name in names)
    for parameter_name, parameter in peft_model.named_parameters():
        parts = parameter_name.split(".")
        is_trained = any(name in parts for name in names) or (trains_biases and parts[-1] == "bias")
        if is_trained and parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ValueError(
                f"{parameter_name} holds NaN or Inf: the adapter is broken and was not merged. "
                "The model is left as it was."
            )


def refuse_biases_without_a_place(peft_model: PeftModel, names: list[str]) -> None:
    """Raise if ``lora_bias`` changes the bias of a layer without one: PEFT would fail in the middle of merging."""
    for layer_name, module in peft_model.named_modules():
        if not isinstance(module, LoraLayer) or getattr(module.get_base_layer(), "bias", None) is not None:
            continue
        if any(module.lora_bias.get(name, False) for name in names):
            raise ValueError(
                f"{layer_name}: lora_bias=True has trained a bias, and this layer has none to merge it into. Keep the "
                "adapter unmerged, or train it with lora_bias=False. The model is left as it was."
            )


def refuse_tied_weights(peft_model: PeftModel) -> None:
    """Raise if an adapter is on one of two layers that share a weight: a merge would change the other one too."""
    tied = tied_target_modules(peft_model.base_model)
    are_tied = any(getattr(config, "ensure_weight_tying", False) for config in peft_model.peft_config.values())
    # Of one copy of quantized rows, which would get the same delta twice.
    adapted = [each.get_base_layer() for each in peft_model.modules() if isinstance(each, LoraLayer)]
    is_one_copy = any(getattr(base, "sharing", ()) for base in adapted)
    if tied and (not are_tied or is_one_copy):
        raise ValueError(
            f"{sorted(tied)} has an adapter, and shares its weight with another layer, which a merge would change "
            "too. Leave it out of target_modules, or train on a model that was loaded with tie_word_embeddings=False. "
            "The model is left as it was."
        )


def refuse_targets(
    found: Sequence[MergeTarget],
    targets: Sequence[MergeTarget],
    names: list[str],
    strategy: Strategy,
    *,
    needs_unmerged: bool,
) -> None:
    """Raise if ``strategy`` does not support one of the layers ``found``, or needs an unmerged weight that is gone.

    ``targets``: those of them that will be merged.
    """
    for target in found:
        source, possible = target.source, target.source.possible_strategies()
        if source.is_written_by_others:
            raise ValueError(
                f"{target.name}: its weight was written since {target.module.merged_adapters} were merged, and "
                "another merge starts from the weight before, which does not have that. Call unmerge_adapter() first, "
                "which subtracts them where it can. The model is left as it was."
            )
        if strategy not in possible:
            raise ValueError(
                f"{target.name}: strategy={strategy!r} is for LoRA on quantized layers, and this is a "
                f"{type(target.module).__name__}. Choose one of {possible}. The model is left as it was."
            )
        if source.knows_unmerged_weight or not target.module.merged:
            continue
        if needs_unmerged or (strategy == "dense" and source.is_merged_by_owner):
            raise ValueError(
                f"{target.name}: {target.module.merged_adapters} are merged already, and the unmerged weight is "
                'needed for evaluate_on and for strategy="dense". Call unmerge_adapter() first, or load the adapter '
                "onto its base again. The model is left as it was."
            )
    if not targets and "any delta" not in STRATEGIES[strategy].rules:
        raise ValueError(
            f'strategy={strategy!r} is for adapters on quantized layers, and {names} lie on none. Use "auto", which '
            "merges them as PEFT does. The model is left as it was."
        )


def refuse_rules(targets: Sequence[MergeTarget], names: list[str], strategy: Strategy, *, has_data: bool) -> None:
    """Raise what a rule would refuse in the middle of the merge: adapters, or a form of a weight, of another kind."""
    for target in targets:
        source, weight = target.source, target.source.unmerged_snapshot().weight
        if weight is None:  # a norm's
            continue
        spec = target.spec or weight.spec
        source.check_strategy(strategy, names, spec)
        method = get_method(spec.method)
        if has_data and STRATEGIES[strategy].data_rules and not method.can_use_hessian(spec):
            raise ValueError(
                f"{source.quantized_base().layer_name}: strategy={strategy!r} with calibration data is not possible "
                f'for {spec}. {method.calibration_requirement} Or merge with "requantize", or "keep" for plain LoRA. '
                "The model is left as it was."
            )


def refuse_to_stay_loaded(peft_model: PeftModel, targets: Sequence[MergeTarget]) -> None:
    """Raise if the wrapper could not take the merge back, which is what it is left for."""
    is_undone = all(target.source.knows_unmerged_weight for target in targets)
    if not (is_undone and isinstance(peft_model.base_model, LoraModel)):
        raise ValueError(
            "unload=False is for LoRA: other tuners' merges into quantized layers cannot be undone bit for bit. "
            "Keep a copy of the model instead. The model is left as it was."
        )
