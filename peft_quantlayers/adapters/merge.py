"""Merge adapters back into the quantized model, and say in numbers what that did."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..layers import dequantize_model
from .lora import LayerMergeReport, LoraQuantizedLinear

Strategy = Literal["requantize", "dense"]
STRATEGIES: tuple[Strategy, ...] = ("requantize", "dense")


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge did, layer by layer and in total. Norms of the total are over all weights together."""

    strategy: str
    layers: tuple[LayerMergeReport, ...]

    @property
    def relative_error(self) -> float:
        """Norm of what the merged weights lost against their float targets, over the norm of these."""
        return _norm(layer.error_norm for layer in self.layers) / (
            _norm(layer.weight_norm for layer in self.layers) or 1.0
        )

    @property
    def change_kept(self) -> float:
        """Part of the adapters' change that is in the merged weights, weighted by its energy; 1 is all of it."""
        energy = sum(layer.change_norm**2 for layer in self.layers)
        if not energy:
            return 1.0
        return sum(layer.change_kept * layer.change_norm**2 for layer in self.layers) / energy

    @property
    def error_to_change(self) -> float:
        """Norm of what rounding lost over the norm of the change: above 1 the noise outweighs the adapter."""
        change = _norm(layer.change_norm for layer in self.layers)
        return _norm(layer.error_norm for layer in self.layers) / change if change else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the totals, and one entry for each layer."""
        return {
            "strategy": self.strategy,
            "relative_error": self.relative_error,
            "change_kept": self.change_kept,
            "error_to_change": self.error_to_change,
            "layers": [dataclasses.asdict(layer) | {"relative_error": layer.relative_error} for layer in self.layers],
        }

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_dict` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [len("layer"), len("total")])
        rows = [f"{'layer':{width}}  bits  rel. error  error/change  change kept"]
        for layer in self.layers:
            ratio = layer.error_norm / layer.change_norm if layer.change_norm else 0.0
            rows.append(
                f"{layer.name:{width}}  {layer.bits_after:4.2f}  {layer.relative_error:10.4f}  {ratio:12.2f}"
                f"  {layer.change_kept:11.2f}"
            )
        rows.append(
            f"{'total':{width}}        {self.relative_error:10.4f}  {self.error_to_change:12.2f}"
            f"  {self.change_kept:11.2f}"
        )
        return "\n".join(rows)


def merge_back(
    peft_model: PeftModel, *, strategy: Strategy = "requantize", adapters: list[str] | None = None
) -> tuple[nn.Module, MergeReport]:
    """Merge adapters into the base model and take the PEFT wrapper off.

    Args:
        peft_model: a PEFT model on a quantized base.
        strategy: ``"requantize"`` sums the adapters' changes in float32 and quantizes each weight once, with the
            spec that it has. ``"dense"`` gives a plain float model, which loses nothing.
        adapters: names of the adapters to merge; None for the active ones.

    Returns:
        The base model, merged, and the report.

    Raises:
        TypeError: not a PeftModel, or ``adapters`` is no list.
        ValueError: an unknown strategy or adapter, or an adapter that holds NaN or Inf; the model is left as it was.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is not supported; choose one of {STRATEGIES}.")
    if not isinstance(peft_model, PeftModel):
        raise TypeError(
            f"merge_back takes a PeftModel, got {type(peft_model).__name__}. For adapters added with "
            "model.add_adapter(...) save them with model.save_pretrained(folder) and load them with "
            "PeftModel.from_pretrained(base, folder)."
        )
    if isinstance(adapters, str):
        raise TypeError(f"adapters must be a list of names, got {adapters!r}; write [{adapters!r}].")
    names = list(peft_model.active_adapters) if adapters is None else list(adapters)
    unknown = [name for name in names if name not in peft_model.peft_config]
    if unknown or not names:
        said = f"no such adapter {unknown}" if unknown else "no adapter to merge"
        raise ValueError(f"adapters={adapters!r}: {said}; the model has {sorted(peft_model.peft_config)}.")
    _refuse_broken_adapters(peft_model, names)
    layers = [module for module in peft_model.modules() if isinstance(module, LoraQuantizedLinear)]
    merge_layers = _merge_dense if strategy == "dense" else _requantize
    report = MergeReport(strategy=strategy, layers=tuple(merge_layers(layers, names)))
    with warnings.catch_warnings():
        # The quantized layers are; what PEFT merges here is the rest, adapters on dense layers.
        warnings.filterwarnings("ignore", "All adapters are already merged")
        model = peft_model.merge_and_unload(adapter_names=names)
    if strategy == "dense":
        dequantize_model(model)
    return model, report


def _requantize(layers: list[LoraQuantizedLinear], names: list[str]) -> list[LayerMergeReport]:
    merged_before = [list(layer.merged_adapters) for layer in layers]
    try:
        for layer in layers:
            layer.merge(adapter_names=names)
    except BaseException:
        for layer, merged in zip(layers, merged_before, strict=True):
            if layer.merged_adapters != merged:
                layer.unmerge()
                layer.merge(adapter_names=merged)
        raise
    return [layer.merge_report for layer in layers if layer.merge_report is not None]


def _merge_dense(layers: list[LoraQuantizedLinear], names: list[str]) -> list[LayerMergeReport]:
    bases = [layer.base_layer for layer in layers]
    reports = []
    try:
        for layer in layers:
            dense, report = layer.merged_linear(names)
            layer.base_layer = dense
            reports.append(report)
    except BaseException:
        for layer, base in zip(layers, bases, strict=True):
            layer.base_layer = base
        raise
    for layer in layers:
        layer.merged_adapters[:] = [name for name in names if name in layer.lora_A]
    return reports


def _refuse_broken_adapters(peft_model: PeftModel, names: list[str]) -> None:
    """Raise, naming the layer, if a parameter of one of the adapters is not finite."""
    for layer_name, layer in peft_model.named_modules():
        if not isinstance(cast(object, layer), BaseTunerLayer):
            continue
        for parameter_name, parameter in layer.named_parameters():
            parts = parameter_name.split(".")
            if parts[0] == "base_layer" or not any(name in parts for name in names):
                continue
            if not torch.isfinite(parameter).all():
                raise ValueError(
                    f"{layer_name}.{parameter_name} holds NaN or Inf: the adapter is broken and was not merged. "
                    "The model is left as it was."
                )


def _norm(norms: Any) -> float:
    return math.sqrt(sum(norm**2 for norm in norms))
