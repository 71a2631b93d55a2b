"""What a model holds, quantized and dense, as a value with a short and a long text. Knows no model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from ..formats import QuantSpec

# Lines of each kind in the short form.
SHOWN_SPECS, SHOWN_REASONS = 4, 9


@dataclass(frozen=True, kw_only=True)
class ModuleSummary:
    """One module that holds parameters of its own.

    Fields:
        name: in the model, without what PEFT adds to it.
        spec: how its weight is stored; None for a dense module.
        reason: why it is dense; empty for a quantized one.
        detail: what more there is to say about that.
        n_parameters: numbers that it stands for, bias included. Of a tensor that several modules share, the first
            counts all.
        nbytes: what these take, scales and all other metadata included.
        bits_per_weight: stored bits of its weight, metadata included, bias not; None for a dense module.
    """

    name: str
    spec: QuantSpec | None = None
    reason: str = ""
    detail: str = ""
    n_parameters: int
    nbytes: int
    bits_per_weight: float | None = None


@dataclass(frozen=True, kw_only=True)
class SummaryGroup:
    """All modules with one spec, or one reason to be dense.

    Fields:
        label: the spec in short, or the reason.
        spec: None for dense modules.
        names: of the modules.
        n_parameters, nbytes: of all of them.
        bits_per_weight: their mean; None for dense modules.
    """

    label: str
    spec: QuantSpec | None
    names: tuple[str, ...]
    n_parameters: int
    nbytes: int
    bits_per_weight: float | None


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """What :func:`summary` found. ``print`` gives a dozen lines, :meth:`table` a line for each module.

    Fields:
        model: name of the model's class.
        modules: all modules with parameters, in the model's order.
        adapter_parameters, adapter_nbytes: what PEFT adapters add; not in the modules.
        is_planned: whether this is what a config would make of the model, rather than what the model is.
    """

    model: str
    modules: tuple[ModuleSummary, ...]
    adapter_parameters: int = 0
    adapter_nbytes: int = 0
    is_planned: bool = False

    @property
    def quantized(self) -> tuple[ModuleSummary, ...]:
        """The quantized layers."""
        return tuple(module for module in self.modules if module.spec is not None)

    @property
    def dense(self) -> tuple[ModuleSummary, ...]:
        """All other modules with parameters."""
        return tuple(module for module in self.modules if module.spec is None)

    @property
    def n_parameters(self) -> int:
        """Numbers that the model stands for, without adapters."""
        return sum(module.n_parameters for module in self.modules)

    @property
    def nbytes(self) -> int:
        """Memory of all parameters, without adapters."""
        return sum(module.nbytes for module in self.modules)

    @property
    def fraction_quantized(self) -> float:
        """Parameters of the quantized layers over those of the model."""
        return sum(module.n_parameters for module in self.quantized) / max(1, self.n_parameters)

    @property
    def by_spec(self) -> tuple[SummaryGroup, ...]:
        """The quantized layers of each distinct spec, those with the most parameters first."""
        return _groups(self.quantized, lambda module: spec_label(cast(QuantSpec, module.spec)))

    @property
    def by_reason(self) -> tuple[SummaryGroup, ...]:
        """The dense modules of each reason, those with the most bytes first."""
        return _groups(self.dense, lambda module: module.reason)

    def table(self) -> str:
        """One line for each module: name, what it is stored as or why it is dense, parameters, bits, bytes."""
        rows = [("module", "stored as", "parameters", "bits", "bytes")]
        for module in self.modules:
            stored = f"dense: {module.reason}" if module.spec is None else spec_label(module.spec)
            bits = 8 * module.nbytes / max(1, module.n_parameters)
            bits = bits if module.bits_per_weight is None else module.bits_per_weight
            shown = f"{bits:.2f}" if module.n_parameters else ""
            stored += f" ({module.detail})" if module.detail else ""
            rows.append(
                (module.name or "(the model)", stored, f"{module.n_parameters:,}", shown, f"{module.nbytes:,}")
            )
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )

    def __str__(self) -> str:
        head = f"{self.model}: {self.n_parameters:,} parameters, {_size(self.nbytes)}"
        lines = [head + (", as the config would make it" if self.is_planned else "")]
        layers = sum(module.nbytes for module in self.quantized)
        lines.append(
            f"quantized: {len(self.quantized)} layers, {100 * self.fraction_quantized:.1f} % of the parameters, "
            f"{_size(layers)}"
        )
        lines += _lines(self.by_spec, SHOWN_SPECS, "layers")
        lines.append(f"dense: {_size(self.nbytes - layers)}")
        lines += _lines(self.by_reason, SHOWN_REASONS, "modules")
        if self.adapter_parameters:
            lines.append(f"adapters: {self.adapter_parameters:,} parameters, {_size(self.adapter_nbytes)}")
        return "\n".join(lines)


def _groups(modules: Iterable[ModuleSummary], label_of: Callable[[ModuleSummary], str]) -> tuple[SummaryGroup, ...]:
    """The modules of each label, the largest groups first."""
    members: dict[tuple[str, QuantSpec | None], list[ModuleSummary]] = {}
    for module in modules:
        members.setdefault((label_of(module), module.spec), []).append(module)
    groups = []
    for (label, spec), group in members.items():
        n_parameters = sum(module.n_parameters for module in group)
        bits = sum((module.bits_per_weight or 0) * module.n_parameters for module in group) / max(1, n_parameters)
        groups.append(
            SummaryGroup(
                label=label,
                spec=spec,
                names=tuple(module.name for module in group),
                n_parameters=n_parameters,
                nbytes=sum(module.nbytes for module in group),
                bits_per_weight=None if spec is None else bits,
            )
        )
    return tuple(sorted(groups, key=lambda group: -group.nbytes))


def spec_label(spec: QuantSpec) -> str:
    """A spec in short: its method and the fields that matter."""
    return " ".join([spec.method, *(f"{name}={getattr(spec, name)}" for name in spec.shown_fields)])


def _lines(groups: tuple[SummaryGroup, ...], n_shown: int, noun: str) -> list[str]:
    """A line for each group; those beyond ``n_shown`` share one."""
    lines = []
    for group in groups[:n_shown]:
        bits = "" if group.bits_per_weight is None else f", {group.bits_per_weight:.2f} bits per weight"
        example = group.names[0] or "the model itself"
        lines.append(f"  {group.label}: {_count(group.names, noun)}{bits}, {_size(group.nbytes)} ({example})")
    if rest := groups[n_shown:]:
        names = [name for group in rest for name in group.names]
        lines.append(f"  {len(rest)} more: {_count(names, noun)}, {_size(sum(group.nbytes for group in rest))}")
    return lines


def _count(names: Sequence[str], noun: str) -> str:
    return f"{len(names)} {noun if len(names) != 1 else noun.removesuffix('s')}"


def _size(nbytes: int) -> str:
    """A number of bytes in kB, MB or GB (powers of ten)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes / 1e3:.1f} kB"
