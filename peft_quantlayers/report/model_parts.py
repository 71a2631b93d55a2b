"""The part of a report on a quantized model: errors, the worst layers, distributions, use of codes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .html_page import folded, heading, note, preformatted, table
from .layer_facts import OF_CODEBOOKS, LayerFacts
from .model_summary import ModelSummary, spec_label
from .reported_facts import mean_error, worst_layers
from .svg_plots import bands, heat_map, is_in_blocks, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Names of distributions that are positive and of several sizes.
LOGARITHMIC = ("scale", "scales", "absmax", "absmax_scale")


def model_parts(summary: ModelSummary, facts: Sequence[LayerFacts], *, n_worst: int = 10) -> list[str]:
    """HTML of what is known of a model."""
    facts = list(facts)
    return [
        heading("Model"),
        preformatted(str(summary)),
        *_errors(facts, n_worst),
        *_bits(facts),
        *_distributions(facts),
        *_code_use(facts),
        folded("every layer", _every_layer(facts)),
    ]


def _errors(facts: list[LayerFacts], n_worst: int) -> list[str]:
    parts = [heading("Error of each layer")]
    known = {each.name: each.error for each in facts if each.error is not None}
    if not known:
        return [*parts, note("Not measured: name the float model that it was made of, with --float_model.")]
    of_outputs = any(each.output_error is not None for each in facts)
    what = "outputs" if of_outputs else "weight"
    parts.append(
        note(
            f"Norm of the error of a layer's {what} over the norm of what the float model has"
            + (", for inputs that the quantized model reads in the text" if of_outputs else "")
            + f". All layers together: {mean_error(facts):.4g}."
        )
    )
    if is_in_blocks(known):
        parts.append(svg(heat_map(known, label=f"relative error of the {what}")))
    worst = worst_layers(facts, n_worst)
    if worst:
        parts += [heading("The worst layers, and what more bits would buy", 3), _worst_table(worst)]
        parts.append(
            note(
                f"{_all_alike(worst)}Larger forms were quantized here without calibration, some rows of each weight "
                "where its method allows that. To give one layer another form: quantize --overrides "
                "'{NAME: {...}}'; to share a budget of bits between all of them: --average_bits or --size."
            )
        )
    return parts


def _worst_table(worst: list[LayerFacts]) -> str:
    n_choices = max(len(each.choices) for each in worst)
    is_told = not _all_alike(worst)
    head = ["layer", *(["stored as"] if is_told else []), "bits", "error", *["with more bits"] * n_choices]
    rows: list[list[object]] = []
    for each in worst:
        choices = [f"{it.error:.4f} ({it.label}: {it.bits_per_weight:.3g} bits)" for it in each.choices]
        stored_as = [spec_label(each.spec)] if is_told else []
        rows.append([each.name, *stored_as, each.bits_per_weight, each.error, *choices])
    return table(head, rows)


def _all_alike(layers: list[LayerFacts]) -> str:
    """A sentence on how ``layers`` are stored, if all are stored alike: a column of it would fill the page."""
    labels = {spec_label(each.spec) for each in layers}
    return f"All of these are {labels.pop()}. " if len(labels) == 1 else ""


def _bits(facts: list[LayerFacts]) -> list[str]:
    bits = {each.name: each.bits_per_weight for each in facts}
    if len({round(number, 2) for number in bits.values()}) < 2 or not is_in_blocks(bits):
        return []  # the summary says it
    return [heading("Bits of each layer"), svg(heat_map(bits, label="bits per weight, all included"))]


def distribution_plots(distributions: Mapping[str, Mapping[str, tuple[float, ...]]]) -> dict[str, Figure]:
    """A plot for each kind of numbers, by what they are; none of what does not lie in blocks.

    ``distributions``: for each layer those of :class:`LayerFacts`.
    """
    plots: dict[str, Figure] = {}
    for name in dict.fromkeys(name for each in distributions.values() for name in each):
        found = {layer: each[name] for layer, each in distributions.items() if name in each}
        label = "magnitude of inputs" if name == "inputs" else name
        axis = "norm" if name == OF_CODEBOOKS else label
        is_logarithmic = name in LOGARITHMIC and all(each[0] > 0 for each in found.values())
        if name == "inputs":  # most are near zero, and the few large ones are what matters
            found = {layer: each for layer, each in found.items() if each[-1] > 0}
            is_logarithmic = True
            found = {layer: tuple(max(number, each[-1] * 1e-6) for number in each) for layer, each in found.items()}
        if found and is_in_blocks(found):
            plots[label] = bands(found, label=axis, is_logarithmic=is_logarithmic)
    return plots


def _distributions(facts: list[LayerFacts]) -> list[str]:
    plots = distribution_plots({each.name: each.distributions for each in facts})
    parts = [part for label, plot in plots.items() for part in (heading(label.capitalize(), 3), svg(plot))]
    if not parts:
        return []
    explained = note("Over the blocks: the median, the middle 90 % (dark) and the smallest and largest (light).")
    return [heading("Distributions"), explained, *parts]


def _code_use(facts: list[LayerFacts]) -> list[str]:
    share = {each.name: _evenness(each) for each in facts}
    used = {each.name: min(use.fraction_used for use in each.code_use) for each in facts}
    has_codebooks = any(each.spec.max_code is None for each in facts)
    noun = "codebook entries" if has_codebooks else "codes"
    least = min(used, key=lambda name: used[name])
    told = "" if not has_codebooks else ", the mean of a layer with several codebooks"
    unused = (
        f"In the layer that uses the fewest, {100 * used[least]:.1f} % of the {noun} are used ({least})."
        if used[least] < 1
        else f"Every layer uses all of its {noun}."
    )
    parts = [
        heading(f"Use of {noun}"),
        note(
            f"Entropy of the codes over what it would be if all {noun} were used alike: 1 is even use{told}. {unused}"
        ),
    ]
    if has_codebooks:
        parts.append(_codebooks(facts))
    if is_in_blocks(share):
        parts.append(svg(heat_map(share, label="entropy / bits of a code")))
        if min(used.values()) < 1:
            parts.append(svg(heat_map(used, label=f"fraction of the {noun} used", limits=(0.0, 1.0))))
    return parts


def _codebooks(facts: list[LayerFacts]) -> str:
    """A line for each codebook, over the layers that have it: the first ones carry most of a weight."""
    head = (
        "codebook", "layers", "entries", "bits of a code", "entropy: mean", "lowest", "in layer", "used: mean", "least"
    )  # fmt: skip
    rows: list[tuple[object, ...]] = []
    with_codebooks = [each for each in facts if each.spec.max_code is None]
    for number in range(max(len(each.code_use) for each in with_codebooks)):
        uses = {each.name: each.code_use[number] for each in with_codebooks if number < len(each.code_use)}
        entries = sorted({use.n_entries for use in uses.values()})
        entropies, used = [use.entropy for use in uses.values()], [use.fraction_used for use in uses.values()]
        rows.append(
            (
                number + 1,
                len(uses),
                ", ".join(map(str, entries)),
                ", ".join(f"{math.log2(each):.4g}" for each in entries),
                sum(entropies) / len(uses),
                min(entropies),
                min(uses, key=lambda name: uses[name].entropy),
                f"{100 * sum(used) / len(uses):.1f} %",
                f"{100 * min(used):.1f} %",
            )
        )
    return table(head, rows)


def _evenness(facts: LayerFacts) -> float:
    """Entropy over the most that there could be, the mean over the codebooks."""
    return sum(use.entropy / max(1e-9, math.log2(use.n_entries)) for use in facts.code_use) / len(facts.code_use)


def _every_layer(facts: list[LayerFacts]) -> str:
    head = ("layer", "stored as", "bits", "weights", "error of weight", "error of outputs", "entropy of codes", "used")
    rows = [
        (
            each.name,
            spec_label(each.spec),
            each.bits_per_weight,
            f"{each.n_weights:,}",
            each.weight_error,
            each.output_error,
            sum(use.entropy for use in each.code_use) / len(each.code_use),
            min(use.fraction_used for use in each.code_use),
        )
        for each in facts
    ]
    return table(head, rows)
