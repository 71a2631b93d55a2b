"""The part of a report on a quantized model: errors, the worst layers, distributions, use of codes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .html_page import folded, heading, note, preformatted, table
from .layer_facts import LayerFacts
from .model_summary import ModelSummary, spec_label
from .reported_facts import mean_error, worst_layers
from .svg_plots import bands, heat_map, is_in_blocks, svg

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
                "Larger forms were quantized here without calibration, some rows of each weight where its method "
                "allows that. overrides={NAME: {...}} gives one layer another form; plan_bits shares a budget of bits "
                "between all of them."
            )
        )
    return parts


def _worst_table(worst: list[LayerFacts]) -> str:
    n_choices = max(len(each.choices) for each in worst)
    head = ["layer", "stored as", "bits", "error", *["with more bits"] * n_choices]
    rows: list[list[object]] = []
    for each in worst:
        choices = [f"{it.error:.4f} ({it.label}: {it.bits_per_weight:.3g} bits)" for it in each.choices]
        rows.append([each.name, spec_label(each.spec), each.bits_per_weight, each.error, *choices])
    return table(head, rows)


def _bits(facts: list[LayerFacts]) -> list[str]:
    bits = {each.name: each.bits_per_weight for each in facts}
    if len({round(number, 2) for number in bits.values()}) < 2 or not is_in_blocks(bits):
        return []  # the summary says it
    return [heading("Bits of each layer"), svg(heat_map(bits, label="bits per weight, all included"))]


def _distributions(facts: list[LayerFacts]) -> list[str]:
    names = dict.fromkeys(name for each in facts for name in each.distributions)
    parts = []
    for name in names:
        found = {each.name: each.distributions[name] for each in facts if name in each.distributions}
        label = "magnitude of inputs" if name == "inputs" else name
        is_logarithmic = name in LOGARITHMIC and all(each[0] > 0 for each in found.values())
        if name == "inputs":  # most are near zero, and the few large ones are what matters
            found = {layer: each for layer, each in found.items() if each[-1] > 0}
            is_logarithmic = True
            found = {layer: tuple(max(number, each[-1] * 1e-6) for number in each) for layer, each in found.items()}
        if found and is_in_blocks(found):
            parts += [heading(label.capitalize(), 3), svg(bands(found, label=label, is_logarithmic=is_logarithmic))]
    if not parts:
        return []
    explained = note("Over the blocks: the median, the middle 90 % (dark) and the smallest and largest (light).")
    return [heading("Distributions"), explained, *parts]


def _code_use(facts: list[LayerFacts]) -> list[str]:
    share = {each.name: _evenness(each) for each in facts}
    used = {each.name: min(use.fraction_used for use in each.code_use) for each in facts}
    has_codebooks = any(each.spec.max_code is None for each in facts)
    noun = "codebook entries" if has_codebooks else "codes"
    parts = [
        heading(f"Use of {noun}"),
        note(
            f"Entropy of the codes over what it would be if all {noun} were used alike: 1 is even use. In the layer "
            f"that uses the fewest, {100 * min(used.values()):.1f} % of the {noun} are used "
            f"({min(used, key=lambda name: used[name])})."
        ),
    ]
    if is_in_blocks(share):
        parts.append(svg(heat_map(share, label="entropy / bits of a code")))
        if min(used.values()) < 1:
            parts.append(svg(heat_map(used, label=f"fraction of the {noun} used", limits=(0.0, 1.0))))
    return parts


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
