"""What a report says of one quantized layer, and how it is counted from the layer's own tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..formats import QuantizedWeight, QuantSpec
from ..methods import get_method

# Shares of a distribution that are shown, between its ends.
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
MEDIAN = QUANTILES.index(0.5)
# The distribution of codebooks: their entries are vectors.
OF_CODEBOOKS = "norm of codebook entries"
# Numbers of a tensor that its distribution is read from.
_SAMPLE = 1 << 18


@dataclass(frozen=True, kw_only=True)
class CodeUse:
    """How evenly codes are used, for one codebook, or for the levels of a grid.

    Fields:
        n_entries: that there are.
        fraction_used: of the entries that some code names.
        entropy: of the codes, in bits; ``log2(n_entries)`` if all are used alike.
    """

    n_entries: int
    fraction_used: float
    entropy: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A larger form that a layer could have.

    Fields:
        label: what differs.
        bits_per_weight: metadata included.
        error: relative, of the same kind as the layer's own.
    """

    label: str
    bits_per_weight: float
    error: float


@dataclass(kw_only=True)
class LayerFacts:
    """One quantized layer.

    Fields:
        name: in the model.
        spec: how it is stored.
        bits_per_weight: metadata included.
        n_weights: numbers that it stands for.
        distributions: of its scales and zeros by the names of their tensors, of the norms of codebook entries, and of
            the magnitudes of its ``inputs``, at :data:`QUANTILES`.
        code_use: of each codebook; one entry for codes of a grid. Of a stack, the means over its experts.
        weight_error: norm of the error over that of the float weight; None without a float model.
        output_error: the same for the layer's outputs; None without a float model and a text.
        choices: what more bits would give; of the worst layers only.
    """

    name: str
    spec: QuantSpec
    bits_per_weight: float
    n_weights: int
    distributions: dict[str, tuple[float, ...]]
    code_use: tuple[CodeUse, ...]
    weight_error: float | None = None
    output_error: float | None = None
    choices: list[Choice] = field(default_factory=list)

    @property
    def error(self) -> float | None:
        """The output error where it is known, else the weight error."""
        return self.weight_error if self.output_error is None else self.output_error


def layer_facts(name: str, weight: QuantizedWeight) -> LayerFacts:
    """What the tensors of ``weight`` say by themselves."""
    return LayerFacts(
        name=name,
        spec=weight.spec,
        bits_per_weight=weight.bits_per_weight,
        n_weights=math.prod(weight.shape),
        distributions=distributions_of(weight),
        code_use=code_use(weight),
    )


def distributions_of(weight: QuantizedWeight) -> dict[str, tuple[float, ...]]:
    """Of the scales and zeros of ``weight`` and of the norms of its codebook entries, at :data:`QUANTILES`."""
    layout = weight.spec.layout_of(weight.shape)
    metadata = [key for key, entry in layout.items() if entry.role in ("scales", "zeros")]
    distributions = {key: quantiles(weight.tensors[key]) for key in metadata}
    for key, entry in layout.items():
        if entry.role == "codebooks":
            distributions[OF_CODEBOOKS] = quantiles(weight.tensors[key].detach().float().flatten(-2).norm(dim=-1))
    return distributions


def quantiles(numbers: Tensor) -> tuple[float, ...]:
    """``numbers`` at :data:`QUANTILES`; the ends are exact, the others of an even sample where there are many."""
    numbers = numbers.detach().flatten().float()
    sample = numbers[:: max(1, len(numbers) // _SAMPLE)]
    inner = torch.quantile(sample, torch.tensor(QUANTILES[1:-1], device=sample.device)).tolist()
    return (float(numbers.min()), *inner, float(numbers.max()))


def code_use(weight: QuantizedWeight) -> tuple[CodeUse, ...]:
    """How the codes of ``weight`` use each codebook, or the levels of its grid; of a stack the means."""
    if weight.leading:
        uses = [code_use(weight[index]) for index in range(weight.leading[0])]
        return tuple(_mean(each) for each in zip(*uses, strict=True))
    layout = weight.spec.layout_of(weight.shape)
    codebooks = [entry for entry in layout.values() if entry.role == "codebooks"]
    codes = weight.codes()
    if codebooks:
        n_codebooks, n_entries = codebooks[0].shape[:2]
        columns = codes.reshape(-1, n_codebooks).unbind(1)
    else:
        largest = weight.spec.max_code or int(codes.max())
        n_entries, columns = largest + 1, (codes.reshape(-1),)
    return tuple(_use(column, n_entries) for column in columns)


def _use(codes: Tensor, n_entries: int) -> CodeUse:
    counts = torch.bincount(codes.long(), minlength=n_entries).double()
    shares = counts[counts > 0] / counts.sum()
    return CodeUse(
        n_entries=n_entries,
        fraction_used=len(shares) / n_entries,
        entropy=float(-(shares * shares.log2()).sum()) + 0.0,
    )


def _mean(uses: tuple[CodeUse, ...]) -> CodeUse:
    return CodeUse(
        n_entries=uses[0].n_entries,
        fraction_used=sum(each.fraction_used for each in uses) / len(uses),
        entropy=sum(each.entropy for each in uses) / len(uses),
    )


@torch.no_grad()
def errors(weight: QuantizedWeight, dense: Tensor, inputs: Tensor | None) -> tuple[float, float | None]:
    """The relative errors of ``weight`` for ``dense``: of the weight, and of the outputs for ``inputs``.

    Args:
        weight: one weight, or a stack of them.
        dense: the float weight of the same shape.
        inputs: some rows that the layer reads, (n, in_features); None where they are not known.
    """
    if weight.leading:
        weights = [errors_squared(weight[index], dense[index]) for index in range(weight.leading[0])]
        return _ratio(sum(error for error, _ in weights), sum(norm for _, norm in weights)), None
    error, norm = errors_squared(weight, dense)
    if inputs is None:
        return _ratio(error, norm), None
    rows, target = inputs.float(), dense.float()
    delta = get_method(weight.spec.method).dequantize(weight) - target
    return _ratio(error, norm), _ratio(_energy(rows @ delta.T), _energy(rows @ target.T))


def errors_squared(weight: QuantizedWeight, dense: Tensor) -> tuple[float, float]:
    """Squared norms of the error of ``weight``, and of ``dense``."""
    if weight.leading:
        pairs = [errors_squared(weight[index], dense[index]) for index in range(weight.leading[0])]
        return sum(error for error, _ in pairs), sum(norm for _, norm in pairs)
    target = dense.float()
    return _energy(get_method(weight.spec.method).dequantize(weight) - target), _energy(target)


def _energy(tensor: Tensor) -> float:
    return float(tensor.double().pow(2).sum())


def _ratio(error: float, norm: float) -> float:
    return math.sqrt(error / norm) if norm else 0.0
