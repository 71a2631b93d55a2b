"""What a merge did to a model, in numbers: the layers' reports, and the totals over them."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluate import Capture
from ..old_names import OldName
from . import advice
from .layer_report import LayerMergeReport

# Of a printed report; a longer one hides what matters.
MAX_LINES = 10


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge did, layer by layer and in total. Norms of the total are over all weights together.

    ``print(report)`` shows the layers that lost most, ``report.table()`` gives all of them as text.

    Fields:
        strategy: the one that was requested.
        layers: one entry for each quantized layer.
        capture: how much of the adapter's effect on held-out text is retained; None if no text was given.
        scores: of the model with its adapter and of the merged one; None without a metric.
    """

    strategy: str
    layers: tuple[LayerMergeReport, ...]
    capture: Capture | None = None
    scores: tuple[float, float] | None = None

    change_kept = OldName("delta_retained")
    output_kept = OldName("output_retained")
    error_to_change = OldName("error_to_delta")

    def done(self, layer: LayerMergeReport) -> str:
        """Deprecated: ``layer.strategy``."""
        warnings.warn("done(layer) is now layer.strategy.", DeprecationWarning, stacklevel=2)
        return layer.strategy

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
        """Norm of the difference between merged weights and their float targets, over the norm of these."""
        return _norm(layer.error_norm for layer in self.layers) / (
            _norm(layer.weight_norm for layer in self.layers) or 1.0
        )

    @property
    def delta_retained(self) -> float:
        """Fraction of the adapters' delta that is in the merged weights, weighted by its energy; 1 is all of it."""
        energy = sum(layer.delta_norm**2 for layer in self.layers)
        if not energy:
            return 1.0
        return sum(layer.delta_retained * layer.delta_norm**2 for layer in self.layers) / energy

    @property
    def output_retained(self) -> float | None:
        """Mean of the layers' ``output_retained``; None where none has one."""
        return _mean(layer.output_retained for layer in self.layers)

    @property
    def output_noise(self) -> float | None:
        """Mean of the layers' ``output_noise``; None where none has one."""
        return _mean(layer.output_noise for layer in self.layers)

    @property
    def error_to_delta(self) -> float:
        """Norm of the rounding error over the norm of the delta: above 1 the noise is larger than the adapter."""
        delta = _norm(layer.delta_norm for layer in self.layers)
        return _norm(layer.error_norm for layer in self.layers) / delta if delta else 0.0

    @property
    def recommendation(self) -> str | None:
        """What to try instead; None if the merge lost little."""
        return advice.recommendation(
            self.layers,
            capture=self.capture,
            output_retained=self.output_retained,
            delta_retained=self.delta_retained,
        )

    @property
    def not_measured(self) -> str | None:
        """What was not measured; None if the predictions were compared, or if rounding added little noise."""
        noise = self.error_to_delta if self.output_noise is None else self.output_noise
        return advice.not_measured(self.layers, is_captured=self.capture is not None, noise=noise)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the totals, and one entry for each layer."""
        return {
            "strategy": self.strategy,
            "bits_before": self.bits[0],
            "bits_after": self.bits[1],
            "relative_error": self.relative_error,
            "delta_retained": self.delta_retained,
            "error_to_delta": self.error_to_delta,
            "output_retained": self.output_retained,
            "output_noise": self.output_noise,
            "capture": None
            if self.capture is None
            else dataclasses.asdict(self.capture)
            | {
                "capture": self.capture.capture if self.capture.is_measurable else None,
                "gain_retained": self.capture.gain_retained,
            },
            "scores": None if self.scores is None else {"adapter": self.scores[0], "merged": self.scores[1]},
            "recommendation": self.recommendation,
            "not_measured": self.not_measured,
            "layers": [dataclasses.asdict(layer) | {"relative_error": layer.relative_error} for layer in self.layers],
        }

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_dict` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def __str__(self) -> str:
        """At most ten lines: the layers that lost most, the total, what was measured, and what to try instead."""
        notes, shown, rest = self._notes(), self.layers, []
        if len(shown) > MAX_LINES - 3 - len(notes):
            n_rows = max(1, MAX_LINES - 4 - len(notes))
            worst = sorted(shown, key=_lost, reverse=True)[:n_rows]
            shown = tuple(layer for layer in self.layers if layer in worst)
            rest = [f"and {len(self.layers) - n_rows} layers that lost less: report.table() has all of them"]
        title = f"merged: {', '.join(sorted({layer.strategy for layer in self.layers})) or 'no quantized layer'}"
        *rows, total = self._rows(shown)
        return "\n".join([title, *rows, *rest, total, *notes])

    def table(self) -> str:
        """A line for each layer and one for the total, as text."""
        return "\n".join(self._rows(self.layers))

    def _rows(self, layers: Sequence[LayerMergeReport]) -> list[str]:
        width = max([len(layer.name) for layer in layers] + [len("layer"), len("total")])
        lines = [
            f"{'layer':{width}}  bits before  after  rel. error  error/delta  delta retained  output retained  noise"
        ]
        for layer in layers:
            ratio = layer.error_norm / (layer.delta_norm or 1.0)
            lines.append(_row(f"{layer.name:{width}}", (layer.bits_before, layer.bits_after), ratio, layer))
        return [*lines, _row(f"{'total':{width}}", self.bits, self.error_to_delta, self)]

    def _notes(self) -> list[str]:
        notes = [] if self.capture is None else [_capture_line(self.capture)]
        if self.scores is not None:
            notes.append(f"score {self.scores[0]:.3f} adapter, {self.scores[1]:.3f} merged")
        if {layer.strategy for layer in self.layers} == {"aware"}:
            notes.append(
                "The outputs are those that were trained. Errors and retained fractions are those of the delta in the "
                "weights without its rounding, which was not trained."
            )
        said = (self.not_measured, self.recommendation)
        return notes + [each for each in said if each is not None]


def _lost(layer: LayerMergeReport) -> float:
    """How much of the delta is not in the outputs, or in the weight, noise included; over the delta."""
    if layer.output_retained is not None:
        return math.hypot(1 - layer.output_retained, layer.output_noise or 0.0)
    return math.hypot(1 - layer.delta_retained, layer.error_norm / (layer.delta_norm or 1.0))


def _row(name: str, bits: tuple[float, float], ratio: float, of: LayerMergeReport | MergeReport) -> str:
    outputs = "" if of.output_retained is None else f"{of.output_retained:15.2f}  {of.output_noise:5.2f}"
    return (
        f"{name}  {bits[0]:11.2f}  {bits[1]:5.2f}  {of.relative_error:10.4f}  {ratio:11.2f}  "
        f"{of.delta_retained:14.2f}  {outputs}"
    )


def _capture_line(capture: Capture) -> str:
    effect = f"capture {capture.capture:.3f}"
    if not capture.is_measurable:
        effect = f"the adapter's effect, a KL of {capture.kl_adapter_base:.0e}, is too small to measure"
    gain = "the adapter lowers the loss by less than 0.01"
    if capture.gain_retained is not None:
        gain = f"{capture.gain_retained:.2f} of the adapter's gain in loss is left"
    return (
        f"{effect}; {gain}: loss {capture.loss_base:.3f} base, {capture.loss_adapter:.3f} adapter, "
        f"{capture.loss_merged:.3f} merged; on {capture.n_tokens:,} tokens"
    )


def _norm(norms: Iterable[float]) -> float:
    return math.sqrt(sum(norm**2 for norm in norms))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
