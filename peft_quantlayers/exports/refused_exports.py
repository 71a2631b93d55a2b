"""What a format cannot hold, said with the layers and every way out. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import check_choice, check_dtype
from ..methods.hqq.export_grids import TARGETS
from .formats.format_base import APPROXIMATIONS, Approximation, ExportFormat, LayerFacts, facts_of
from .formats.format_registry import export_formats
from .given_model import GivenModel, opened_model

# Layers that a refusal names.
_SHOWN_LAYERS = 3


@dataclass(frozen=True, kw_only=True)
class Model:
    """What decides whether a format can hold a model.

    Fields:
        config: the parsed config.json.
        facts: of each quantized layer.
        dense_linears: names of the linear modules that are dense.
    """

    config: Mapping[str, Any]
    facts: Sequence[LayerFacts]
    dense_linears: Collection[str]

    @staticmethod
    def of(given: GivenModel, facts: Mapping[str, LayerFacts]) -> Model:
        """``given``, whose quantized layers have these ``facts``, by name."""
        dense_linears = {name for name, _ in given.modules.values()} - facts.keys()
        return Model(config=given.config, facts=list(facts.values()), dense_linears=dense_linears)


def refuse_arguments(target: ExportFormat, *, approximate: Any, dtype: Any, has_data: bool) -> None:
    """Raise ValueError or TypeError for arguments that ``target`` does not take, whatever the model.

    ``has_data``: calibration data or a float model is given.
    """
    check_dtype("dtype", dtype)
    if dtype is not None and target.dtypes is not None and dtype not in target.dtypes:
        can = " or ".join(f"dtype={each}" for each in target.dtypes)
        raise ValueError(f"{target.name} files are not written in {dtype}; use {can}. Nothing was written.")
    if approximate is not None:
        check_choice("approximate", approximate, APPROXIMATIONS)
        if approximate not in target.approximations:
            can = f"it takes {', '.join(target.approximations)}" if target.approximations else "it takes none"
            raise ValueError(f"{target.name} cannot be written with approximate={approximate!r}; {can}.")
    if approximate != "requantize" and has_data:
        raise ValueError('calibration and float_model are for approximate="requantize". Nothing was written.')


def refuse_adapters(target: ExportFormat, *, has_adapter: bool, has_branches: bool) -> None:
    """Raise NotImplementedError if something is to lie beside the model, and the format has no form for it."""
    if target.adapter_form is None and (has_adapter or has_branches):
        what = "an adapter" if has_adapter else 'a low-rank branch, which a merge with "keep" leaves,'
        raise NotImplementedError(
            f"{target.name}: {what} is not written beside the model. Merge the adapter first "
            "(peft_quantlayers.merge_back, with another strategy than keep), and export the merged model. Nothing was "
            "written."
        )


def refuse_later_misfits(
    target: ExportFormat,
    folder: Path,
    approximate: Approximation | None,
    merged: Callable[[str, LayerFacts], LayerFacts | None],
) -> None:
    """As :func:`refuse_misfits`, for the model in ``folder`` after a merge.

    ``merged`` gives what becomes of a layer, by the name of its module and its facts; None for one that gets dense.
    """
    with opened_model(folder) as given:
        found = {name: merged(layer.module, facts_of(layer)) for name, layer in given.layers.items()}
        facts = {name: each for name, each in found.items() if each is not None}
        refuse_misfits(target, Model.of(given, facts), approximate)


def refuse_misfits(target: ExportFormat, asked: Model, approximate: Approximation | None) -> None:
    """Raise ValueError, naming layers and ways out, unless ``target`` can hold all layers."""
    facts = asked.facts
    reasons = _misfits(target, asked, approximate)
    if not facts and target.name not in ("dense", "gguf"):
        raise ValueError(
            f"the model has no quantized layers, and {target.name} is a format of such. Quantize it first "
            '(peft_quantlayers.quantize_model), or export it as "dense". Nothing was written.'
        )
    if not reasons:
        return
    shown = "\n  ".join([*reasons[:_SHOWN_LAYERS], *([f"... and {len(reasons) - 3} more."] if reasons[3:] else [])])
    raise ValueError(
        f"{target.name} cannot hold this model, and nothing was written:\n  {shown}\n" + _ways_out(target, asked)
    )


def _misfits(target: ExportFormat, asked: Model, approximate: Approximation | None) -> list[str]:
    if target.is_of_decoders and (reason := _kind(asked.config)):
        return [f"it is {reason}, and the export of {target.name} is for language models that have a decoder only."]
    if reason := target.config_misfit(asked.config):
        return [f"{reason}."]
    found = [f"{each.name}: {reason}." for each in asked.facts if (reason := _misfit(target, each, approximate))]
    together = "" if found else target.model_misfit(asked.facts, asked.dense_linears, approximate)
    return [*found, *([together + "."] if together else [])]


def _misfit(target: ExportFormat, facts: LayerFacts, approximate: Approximation | None) -> str:
    stack = facts.stack
    if stack is None:
        return target.misfit(facts, approximate)
    if not stack.tensors:
        return "transformers does not say how files keep these experts: peft_quantlayers.dequantize_model, and save it"
    if stack.has_branch and target.name != "dense":
        return "low-rank branches lie beside its experts, and no engine reads them: merge with another strategy"
    return target.stack_misfit(facts, stack, approximate) or target.misfit(facts, approximate)


def _kind(config: Mapping[str, Any]) -> str:
    """What a model is besides a decoder of text; empty if nothing."""
    if config.get("is_encoder_decoder"):
        return "an encoder-decoder"
    parts = [name for name in config if name.endswith("_config") and name.startswith(("vision", "audio", "speech"))]
    return f"a model of more than text ({parts[0]})" if any(config[name] for name in parts) else ""


def _ways_out(target: ExportFormat, asked: Model) -> str:
    ways = [f"approximate={each!r}" for each in target.approximations if not _misfits(target, asked, each)]
    others = [each for each in export_formats().values() if each is not target and not _misfits(each, asked, None)]
    ways += [f"format={each.name!r} (for {', '.join(each.engines)})" for each in others]
    grid = f": HQQConfig.for_export({target.name!r})" if target.name in TARGETS else ""
    return f"What works for it: {'; '.join(ways)}. Or quantize the float model onto a grid of the format{grid}."
