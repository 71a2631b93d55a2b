"""What an export came to, as values that print themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Relative error of a weight whose scales and zeros were rounded to float16 and no further.
EXACT_ERROR = 1e-3
# Layers that the text shows: those with the largest errors.
SHOWN_LAYERS = 5


@dataclass(frozen=True, kw_only=True)
class LayerExport:
    """One quantized layer before and after.

    Fields:
        name: of its module, as the files spell it.
        n_weights: out_features * in_features.
        stored_as: the layout in the exported files, in words.
        bits_before, bits_after: stored bits per weight, metadata included.
        error_norm, weight_norm: Frobenius norms of what the export changed in the weight, and of the weight; float64
            sums of what a reader will compute in float32.
    """

    name: str
    n_weights: int
    stored_as: str
    bits_before: float
    bits_after: float
    error_norm: float
    weight_norm: float

    @property
    def relative_error(self) -> float:
        """``error_norm`` over ``weight_norm``."""
        return self.error_norm / self.weight_norm if self.weight_norm else float(self.error_norm > 0)

    @property
    def is_exact(self) -> bool:
        """Whether the layer computes what it did, up to the rounding of its scales and zeros to float16."""
        return self.relative_error <= EXACT_ERROR


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What :func:`peft_quantlayers.export` wrote. ``str()`` of it is a summary.

    Fields:
        format: name of the format.
        folder: where the files are.
        layers: the quantized layers.
        notes: what a user should know, in sentences.
        serving_command: starts an engine with the exported model.
        kl: mean KL divergence of the exported model from the source on the given text, in nats per token; None if it
            was not measured.
        n_bytes: of all files.
    """

    format: str
    folder: str
    layers: tuple[LayerExport, ...]
    notes: tuple[str, ...]
    serving_command: str
    kl: float | None = None
    n_bytes: int = 0

    @property
    def is_exact(self) -> bool:
        """Whether every layer is."""
        return all(layer.is_exact for layer in self.layers)

    @property
    def relative_error(self) -> float:
        """Of all layers' weights together."""
        norm = _norm([layer.weight_norm for layer in self.layers])
        return _norm([layer.error_norm for layer in self.layers]) / norm if norm else 0.0

    @property
    def bits(self) -> tuple[float, float]:
        """Mean bits per weight of the quantized layers, before and after."""
        n_weights = sum(layer.n_weights for layer in self.layers) or 1
        before = sum(layer.bits_before * layer.n_weights for layer in self.layers)
        return before / n_weights, sum(layer.bits_after * layer.n_weights for layer in self.layers) / n_weights

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields, totals included."""
        totals = {"is_exact": self.is_exact, "relative_error": self.relative_error}
        bits = dict(zip(("bits_before", "bits_after"), self.bits, strict=True))
        return asdict(self) | totals | bits

    def save(self, file: str | Path) -> None:
        """Write :meth:`to_dict` as JSON."""
        Path(file).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def __str__(self) -> str:
        before, after = self.bits
        exactness = "exact" if self.is_exact else f"not exact: relative error of the weights {self.relative_error:.2g}"
        lines = [
            f"{self.format}: {len(self.layers)} quantized layers, {before:.2f} bits per weight before and {after:.2f} "
            f"after, {self.n_bytes / 1e6:,.1f} MB, {exactness}."
        ]
        if self.kl is not None:
            lines.append(f"KL divergence from the source: {self.kl:.3g} nats per token.")
        worst = sorted((layer for layer in self.layers if not layer.is_exact), key=lambda each: -each.relative_error)
        lines += [f"  {layer.name}: {layer.relative_error:.2g} ({layer.stored_as})" for layer in worst[:SHOWN_LAYERS]]
        return "\n".join([*lines, *self.notes, f"Serve it with: {self.serving_command}"])


def _norm(norms: Sequence[float]) -> float:
    return math.sqrt(sum(norm**2 for norm in norms))
