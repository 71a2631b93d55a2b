"""A plan of bits: what each layer costs in each form, and which form each gets under a budget. JSON on disk."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import convert_file_size_to_int

from ..arguments import check_number
from ..storage import replace_file
from .budget_solver import Option, allocate

FORMAT = "peft_quantlayers bit plan"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """One form that a layer may take.

    Fields:
        fields: of its spec that differ from the config.
        n_bytes: stored bytes, scales, zeros and codebooks included.
        kl: estimated nats of KL to the float model for each token, if only this layer were quantized.
    """

    fields: dict[str, Any]
    n_bytes: int
    kl: float


@dataclass(kw_only=True)
class BitPlan:
    """Which bits each layer gets.

    Fields:
        layers: the forms that were measured, for each layer.
        chosen: the index of the one that each layer gets.
        n_weights: numbers of the quantized layers.
        other_bytes: bytes of all tensors that stay as they are (embeddings, norms, biases, dense layers).
        measured_kl: nats of KL to the float model for each token on some of the calibration tokens, once
            ``quantize_model(budget=plan)`` has measured it; None before. Far above :attr:`predicted_kl` the errors of
            layers do not just add up, and the plan's order of layers is less to be trusted.
    """

    layers: dict[str, list[LayerChoice]]
    chosen: dict[str, int]
    n_weights: int
    other_bytes: int
    measured_kl: float | None = None

    @property
    def overrides(self) -> dict[str, dict[str, Any]]:
        """For a config's ``overrides``: the fields of each layer by its name."""
        return {name: dict(self._choice(name).fields) for name in self.chosen if self._choice(name).fields}

    @property
    def n_bytes(self) -> int:
        """Stored bytes of the quantized layers."""
        return sum(self._choice(name).n_bytes for name in self.chosen)

    @property
    def model_bytes(self) -> int:
        """Stored bytes of all tensors of the model."""
        return self.n_bytes + self.other_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the quantized layers, scales and all other metadata included."""
        return 8 * self.n_bytes / self.n_weights

    @property
    def predicted_kl(self) -> float:
        """Nats of KL to the float model for each token, as the sum over the layers."""
        return sum(self._choice(name).kl for name in self.chosen)

    def _choice(self, name: str) -> LayerChoice:
        return self.layers[name][self.chosen[name]]

    def with_budget(self, *, average: float | None = None, size: int | str | None = None) -> BitPlan:
        """A plan for another budget from the same measurements. Arguments and errors as :func:`plan_bits`."""
        budget = budget_bytes(self, average=average, size=size)
        options = {
            name: [Option(choice.n_bytes, choice.kl) for choice in choices] for name, choices in self.layers.items()
        }
        try:
            chosen = allocate(options, budget)
        except ValueError:
            smallest = replace(self, chosen={name: each.index(min(each)) for name, each in options.items()})
            raise ValueError(
                f"{_described(average, size)} cannot be met: with the smallest choice everywhere the model takes "
                f"{smallest.bits_per_weight:.3f} bits per weight, scales included, and {smallest.model_bytes:,} "
                "bytes. Raise the budget, or give smaller choices. The model was not changed."
            ) from None
        return replace(self, chosen=chosen, measured_kl=None)

    def save(self, file: str | Path) -> None:
        """Write the plan as JSON, which :meth:`load` reads."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "bits_per_weight": self.bits_per_weight,
            "n_bytes": self.n_bytes,
            "model_bytes": self.model_bytes,
            "predicted_kl": self.predicted_kl,
            "measured_kl": self.measured_kl,
            "n_weights": self.n_weights,
            "other_bytes": self.other_bytes,
            "layers": {
                name: {"chosen": self.chosen[name], "choices": [vars(choice) for choice in choices]}
                for name, choices in self.layers.items()
            },
        }
        with replace_file(Path(file)) as part:
            part.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, file: str | Path) -> BitPlan:
        """The plan that :meth:`save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            document = _document(Path(file))
            if document["format"] != FORMAT or document["version"] > VERSION:
                raise ValueError(f"it says {document['format']!r}, version {document['version']}")
            layers = {
                name: [LayerChoice(**choice) for choice in entry["choices"]]
                for name, entry in document["layers"].items()
            }
            plan = cls(
                layers=layers,
                chosen={name: entry["chosen"] for name, entry in document["layers"].items()},
                n_weights=document["n_weights"],
                other_bytes=document["other_bytes"],
                measured_kl=document["measured_kl"],
            )
            if not math.isfinite(plan.predicted_kl + plan.bits_per_weight) or min(plan.chosen.values(), default=0) < 0:
                raise ValueError("a number in it makes no sense")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
            reason = f"{error} is missing in it" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{file} is no plan of bits that this version reads ({reason}). BitPlan.save writes them; make "
                "another with plan_bits."
            ) from None
        return plan

    def __str__(self) -> str:
        measured = "" if self.measured_kl is None else f", measured {self.measured_kl:.4f}"
        counts: dict[str, int] = {}
        for name in self.chosen:
            fields = ", ".join(f"{key}={value}" for key, value in self._choice(name).fields.items()) or "as configured"
            counts[fields] = counts.get(fields, 0) + 1
        layers = "; ".join(f"{n} x {fields}" for fields, n in sorted(counts.items()))
        return (
            f"{self.bits_per_weight:.3f} bits per weight, {self.model_bytes:,} bytes with all else; predicted KL "
            f"{self.predicted_kl:.4f}{measured}; {layers}"
        )


def _document(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``. Raises ValueError where there is none, or one that is no plan."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError("it is no text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is empty or no JSON: {error}") from None
    if not isinstance(document, dict) or "format" not in document:
        raise ValueError(
            f"its JSON is {'an object without' if isinstance(document, dict) else 'no object with'} 'format'"
        )
    return document


def budget_bytes(plan: BitPlan, *, average: float | None, size: int | str | None) -> int:
    """The bytes that the quantized layers may take.

    Raises:
        TypeError, ValueError: none of both budgets, both, or one that is no number or size.
    """
    if (average is None) == (size is None):
        raise TypeError(
            "plan_bits needs one budget: average=3.5 (stored bits per weight, scales included) or size='4GB' (the "
            "model's tensors)."
        )
    if average is not None:
        check_number("average", average, above=0.0, at_most=32.0)
        return math.floor(average * plan.n_weights / 8)
    return bytes_of_size(size) - plan.other_bytes


def bytes_of_size(size: Any) -> int:
    """The bytes of a number, or of a text such as "4GB". Raises ValueError for what is no size."""
    try:
        return convert_file_size_to_int(size)
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"size={size!r} is no size; write for example '4GB'.") from None


def _described(average: float | None, size: int | str | None) -> str:
    return f"average={average}" if size is None else f"size={size!r}"
