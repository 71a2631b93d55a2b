"""What a merge did, in numbers: layer by layer and in total."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..evaluate import Capture

# Below this much of the adapter's effect, or of its change, another strategy is worth its price.
LOW_CAPTURE = 0.9


@dataclass(frozen=True, kw_only=True)
class LayerMergeReport:
    """What one merge did to one layer.

    Fields:
        name: module name of the base layer.
        adapters: adapters whose change is in the merged weight.
        method: that the layer is quantized with.
        n_weights: of the layer.
        bits_before, bits_after: stored bits per weight.
        weight_norm, change_norm, error_norm: Frobenius norms of the float target ``W + change``, of the change,
            and of what quantizing the target lost.
        change_kept: the part of the change that is in the merged weight: 1 for all of it, 0 for none. The
            coefficient of the change in ``merged - W``, by least squares; noise counts in ``error_norm`` only.
        output_kept: likewise of the change in the outputs, on the tokens of ``evaluate_on``, else on the calibration
            inputs; None without either.
        output_noise: norm of what else changed in the outputs, over that of the adapter's change; likewise.
        strategies: that these adapters on this weight can be merged with, beside "requantize" and "dense"; "aware" if
            such adapters can be trained for it.
        is_aware: the adapters were trained through the rounding of this weight, for "aware".
        can_be_qalora: QA-LoRA adapters, which merge exactly, can be trained on this weight.
    """

    name: str
    adapters: tuple[str, ...]
    method: str
    n_weights: int
    bits_before: float
    bits_after: float
    weight_norm: float
    change_norm: float
    error_norm: float
    change_kept: float
    output_kept: float | None = None
    output_noise: float | None = None
    strategies: tuple[str, ...] = ()
    is_aware: bool = False
    can_be_qalora: bool = False

    @property
    def relative_error(self) -> float:
        """``error_norm / weight_norm``."""
        return self.error_norm / self.weight_norm if self.weight_norm else 0.0


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge did, layer by layer and in total. Norms of the total are over all weights together.

    Fields:
        strategy: the one that was asked for.
        layers: one entry for each quantized layer.
        capture: what is left of the adapter's effect on held-out text; None where none was given.
        scores: of the model with its adapter and of the merged one; None without a metric.
    """

    strategy: str
    layers: tuple[LayerMergeReport, ...]
    capture: Capture | None = None
    scores: tuple[float, float] | None = None

    def done(self, layer: LayerMergeReport) -> str:
        """The strategy that ``layer`` was merged with: what "auto" has chosen for it, else the one asked for."""
        if self.strategy != "auto":
            return self.strategy
        return "aware" if layer.is_aware else "exact" if "exact" in layer.strategies else "requantize"

    @property
    def bits(self) -> tuple[float, float]:
        """Stored bits per weight before and after, over all layers."""
        n_weights = sum(layer.n_weights for layer in self.layers) or 1
        before, after = (
            sum(getattr(layer, name) * layer.n_weights for layer in self.layers) / n_weights
            for name in ("bits_before", "bits_after")
        )
        return before, after

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
    def output_kept(self) -> float | None:
        """Mean of the layers' ``output_kept``; None where none has one."""
        return _mean(layer.output_kept for layer in self.layers)

    @property
    def output_noise(self) -> float | None:
        """Mean of the layers' ``output_noise``; None where none has one."""
        return _mean(layer.output_noise for layer in self.layers)

    @property
    def error_to_change(self) -> float:
        """Norm of what rounding lost over the norm of the change: above 1 the noise outweighs the adapter."""
        change = _norm(layer.change_norm for layer in self.layers)
        return _norm(layer.error_norm for layer in self.layers) / change if change else 0.0

    @property
    def recommendation(self) -> str | None:
        """What to try instead, where this merge lost much; None where it did not."""
        done = {self.done(layer) for layer in self.layers}
        if self.capture is not None and self.capture.is_measurable:
            kept, what = self.capture.capture, "effect on the predictions is left"
        elif any(layer.is_aware and self.done(layer) != "aware" for layer in self.layers):
            return (
                'The adapters were trained merge-aware, and only strategy="aware" gives the model that was trained: '
                "without the rounding they compute something else."
            )
        elif done == {"aware"}:
            return None  # its change in the weights is not what it was trained for; its outputs are
        elif self.output_kept is not None:
            kept, what = self.output_kept, "change in the outputs is left"
        else:
            kept, what = self.change_kept, "change is in the weights"
        if kept >= LOW_CAPTURE:
            return None
        others = ["more text to calibrate on, or finetune_epochs in the Calibration"] if "calibrated" in done else []
        others += [way for name, way in self._other_ways().items() if name not in done]
        return f"{kept:.2f} of the adapter's {what}." + (f" Instead: {'; or '.join(others)}." if others else "")

    def _other_ways(self) -> dict[str, str]:
        """Strategies that these layers could be merged with, the best first, and how to say so."""
        if any(layer.is_aware for layer in self.layers):
            return {"aware": 'strategy="aware", which these adapters were trained for'}
        possible = set.intersection(*(set(layer.strategies) for layer in self.layers)) if self.layers else set()
        ways = {
            "exact": 'strategy="exact", which rounds no code',
            "calibrated": 'strategy="calibrated" with some text',
            "aware": 'train with peft_quantlayers.enable_merge_aware and merge with strategy="aware"',
            "append": 'strategy="append", which takes a bit per weight more',
            "keep": 'strategy="keep", which saves the adapter as a low-rank branch and loses nothing',
        }
        found = {name: way for name, way in ways.items() if name in possible}
        if "aware" in found and all(layer.can_be_qalora for layer in self.layers):
            found["qalora"] = "train with QA-LoRA, which merges exactly"
        if "keep" not in found:
            found["dense"] = 'strategy="dense", a float model, which loses nothing'
        return found

    @property
    def not_measured(self) -> str | None:
        """What these figures do not tell; None where they tell all, or rounding made little noise."""
        rounded = [layer for layer in self.layers if self.done(layer) not in ("aware", "exact", "keep", "dense")]
        noise = self.error_to_change if self.output_noise is None else self.output_noise
        if self.capture is not None or not rounded or noise**2 < 1 - LOW_CAPTURE:
            return None
        return (
            f"Beside the adapter's change, rounding made noise of {noise:.2f} times its size. What that does to the "
            "predictions was not measured: give evaluate_on=held-out token ids."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the totals, and one entry for each layer."""
        return {
            "strategy": self.strategy,
            "bits_before": self.bits[0],
            "bits_after": self.bits[1],
            "relative_error": self.relative_error,
            "change_kept": self.change_kept,
            "error_to_change": self.error_to_change,
            "output_kept": self.output_kept,
            "output_noise": self.output_noise,
            "capture": None
            if self.capture is None
            else dataclasses.asdict(self.capture)
            | {"capture": self.capture.capture if self.capture.is_measurable else None},
            "scores": None if self.scores is None else {"adapter": self.scores[0], "merged": self.scores[1]},
            "recommendation": self.recommendation,
            "not_measured": self.not_measured,
            "layers": [
                dataclasses.asdict(layer) | {"relative_error": layer.relative_error, "strategy": self.done(layer)}
                for layer in self.layers
            ],
        }

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_dict` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [len("layer"), len("total")])

        def row(name: str, bits: tuple[float, float], *figures: float, of: LayerMergeReport | MergeReport) -> str:
            relative_error, ratio, kept = figures
            outputs = "" if of.output_kept is None else f"{of.output_kept:11.2f}  {of.output_noise:5.2f}"
            return (
                f"{name:{width}}  {bits[0]:11.2f}  {bits[1]:5.2f}  {relative_error:10.4f}  {ratio:12.2f}  {kept:11.2f}"
                f"  {outputs}"
            )

        done = ", ".join(sorted({self.done(layer) for layer in self.layers})) or "no quantized layer"
        rows = [f"merged: {done}"]
        rows += [f"{'layer':{width}}  bits before  after  rel. error  error/change  change kept  output kept  noise"]
        for layer in self.layers:
            bits, ratio = (layer.bits_before, layer.bits_after), layer.error_norm / (layer.change_norm or 1.0)
            figures = layer.relative_error, ratio, layer.change_kept
            rows.append(row(layer.name, bits, *figures, of=layer))
        figures = self.relative_error, self.error_to_change, self.change_kept
        rows.append(row("total", self.bits, *figures, of=self))
        if self.capture is not None:
            effect = f"capture {self.capture.capture:.3f}"
            if not self.capture.is_measurable:
                effect = f"the adapter's effect, a KL of {self.capture.kl_adapter_base:.0e}, is too small to measure"
            rows.append(
                f"{effect}; loss {self.capture.loss_base:.3f} base, "
                f"{self.capture.loss_adapter:.3f} adapter, {self.capture.loss_merged:.3f} merged; on "
                f"{self.capture.n_tokens:,} tokens"
            )
        if self.scores is not None:
            rows.append(f"score {self.scores[0]:.3f} adapter, {self.scores[1]:.3f} merged")
        if done == "aware":
            rows.append(
                "The outputs are those that were trained. Errors and what was kept are those of the change in the "
                "weights without its rounding, which was not trained."
            )
        rows += [said for said in (self.not_measured, self.recommendation) if said is not None]
        return "\n".join(rows)


def layer_report(
    name: str,
    adapters: list[str],
    *,
    method: str,
    before: Tensor,
    target: Tensor,
    merged: Tensor,
    bits: tuple[float, float],
    strategies: tuple[str, ...],
    is_aware: bool = False,
    can_be_qalora: bool = False,
) -> LayerMergeReport:
    """The report on a layer whose weight was ``before``, should be ``target`` and became ``merged``; all float32."""
    return LayerMergeReport(
        name=name,
        adapters=tuple(adapters),
        method=method,
        n_weights=target.numel(),
        bits_before=bits[0],
        bits_after=bits[1],
        weight_norm=float(target.norm()),
        change_norm=float((target - before).norm()),
        error_norm=float((merged - target).norm()),
        change_kept=change_coefficient(before, target, merged),
        strategies=strategies,
        is_aware=is_aware,
        can_be_qalora=can_be_qalora,
    )


def change_coefficient(before: Tensor, target: Tensor, merged: Tensor, hessian: Tensor | None = None) -> float:
    """The coefficient of ``target - before`` in ``merged - before``, by least squares; 1 without a change.

    With ``hessian`` (in_features, in_features), the second moment of the inputs, that of the outputs' change.
    """
    change = target - before
    return coefficient(merged - before, change, change if hessian is None else change @ hessian.to(change.device))


def coefficient(moved: Tensor, change: Tensor, weighted: Tensor) -> float:
    """That of ``change`` in ``moved``, where ``weighted`` is the change times what counts; 1 without a change."""
    energy = (weighted * change).sum()
    return float((moved * weighted).sum() / energy) if energy > 0 else 1.0


def _norm(norms: Any) -> float:
    return math.sqrt(sum(norm**2 for norm in norms))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
