"""The grid that ``approximate="requantize"`` quantizes a layer onto."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..methods import HQQSpec
from .formats.format_base import LayerFacts
from .formats.grid_format import GridFormat

# For a method without a width of its own, or without groups, such as AQLM.
DEFAULT_NBITS = 4
DEFAULT_GROUP_SIZE = 64
# That kernels of engines take.
_GROUP_SIZES = (128, 64, 32, 16)


def target_spec(facts: LayerFacts, export_format: GridFormat) -> HQQSpec:
    """The grid for a layer: its own width and groups where the format has them, and zeros that are codes.

    Raises:
        ValueError: no group size of the format divides the inputs.
    """
    wanted = facts.nbits or getattr(facts.spec, "nbits", DEFAULT_NBITS)
    widths = export_format.widths if facts.stack is None else export_format.expert_widths or export_format.widths
    nbits = next((width for width in sorted(widths) if width >= wanted), max(widths))
    own = facts.group_size or getattr(facts.spec, "group_size", DEFAULT_GROUP_SIZE) or facts.in_features
    sizes = export_format.group_sizes or (own, *_GROUP_SIZES)
    fitting = [size for size in sizes if facts.in_features % size == 0]
    if not fitting:
        raise ValueError(
            f"{facts.name}: no group size of {export_format.name} divides in_features={facts.in_features}."
        )
    group_size = min(fitting, key=lambda size: abs(size - own))
    is_symmetric = facts.stack is not None and export_format.are_experts_symmetric
    has_integer_zeros = not (export_format.holds_float_zeros(nbits) or is_symmetric)
    return HQQSpec(nbits=nbits, group_size=group_size, integer_zero=has_integer_zeros, symmetric=is_symmetric)


def requantized_facts(facts: Mapping[str, LayerFacts], export_format: GridFormat) -> dict[str, LayerFacts]:
    """What ``facts`` will be once the layers have their :func:`target_spec`."""
    found = {}
    for name, each in facts.items():
        spec = target_spec(each, export_format)
        found[name] = dataclasses.replace(
            each, spec=spec, nbits=spec.nbits, group_size=spec.group_size or each.in_features, has_code_zeros=True
        )
    return found
