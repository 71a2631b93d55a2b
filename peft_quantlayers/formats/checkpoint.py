"""Our own format: the quantization part of ``config.json``, which says how each module is stored.

``{"quant_method": "quantlayers", "format_version": 1, "specs": [...], "modules": {name: index into specs}}``, with
``"compute_dtype"`` where the layers compute in another dtype than the model's. Version 2 adds
``"branches": {name: rank}``, the layers that have a low-rank branch. Version 3 adds
``"compute_dtypes": {name: dtype}``, the layers that compute in another dtype than the rest. Version 4 has specs with
fields that older readers do not know (:attr:`QuantSpec.format_version`). Readers accept
every format version up to their own; writers write the oldest that says everything, so that older readers read what
they can.
"""

from collections.abc import Mapping
from typing import Any

from ..arguments import check_choice
from .checkpoint_format import CheckpointFormat, CheckpointTensors, ModelDescription, SpecFromDict
from .spec import METADATA_DTYPES, QuantSpec

FORMAT_VERSION = 4
# The fields that each version added.
_ADDED_FIELDS = {2: "branches", 3: "compute_dtypes"}
# The name under which transformers finds our quantizer and our checkpoints.
QUANT_METHOD = "quantlayers"
MAX_MODULES = 1_000_000


class QuantlayersFormat(CheckpointFormat):
    """Any model of layers of registered methods."""

    name = QUANT_METHOD

    def can_hold(self, description: ModelDescription) -> str | None:
        return None

    def write(self, description: ModelDescription) -> dict[str, Any]:
        fields = specs_to_json(description.specs, description.branches, description.compute_dtypes)
        dtype = description.compute_dtype
        return fields if dtype is None else fields | {"compute_dtype": dtype}

    def read(
        self, fields: Mapping[str, Any], tensors: CheckpointTensors, *, spec_from_dict: SpecFromDict
    ) -> ModelDescription:
        fields = dict(fields)
        compute_dtype = fields.pop("compute_dtype", None)
        if compute_dtype is not None:
            check_choice("quantization_config: compute_dtype", compute_dtype, METADATA_DTYPES)
        specs = specs_from_json(fields, spec_from_dict)
        return ModelDescription(
            specs=specs,
            compute_dtype=compute_dtype,
            compute_dtypes=_compute_dtypes_from_json(fields),
            branches=branches_from_json(fields),
        )


def specs_to_json(
    specs: Mapping[str, QuantSpec],
    branches: Mapping[str, int] | None = None,
    compute_dtypes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The JSON form of module names and their specs, each distinct spec written once, with the ranks of branches and
    the compute dtypes of single layers."""
    distinct = list(dict.fromkeys(specs.values()))
    given = {"branches": branches, "compute_dtypes": compute_dtypes}
    added = {name: dict(values) for name, values in given.items() if values}
    versions = [version for version, name in _ADDED_FIELDS.items() if name in added]
    return added | {
        "quant_method": QUANT_METHOD,
        "format_version": max([1, *versions, *(spec.format_version for spec in distinct)]),
        "specs": [spec.to_dict() for spec in distinct],
        "modules": {name: distinct.index(spec) for name, spec in specs.items()},
    }


def specs_from_json(fields: Any, spec_from_dict: SpecFromDict) -> dict[str, QuantSpec]:
    """Module names and specs from what :func:`specs_to_json` wrote, every value checked.

    Args:
        fields: the parsed ``quantization_config``.
        spec_from_dict: makes one spec of one mapping, and refuses what it does not know.

    Raises:
        ValueError: another method, a newer format, or an invalid value; says which.
        TypeError: a value of the wrong type.
    """
    if not isinstance(fields, Mapping):
        raise TypeError(f"quantization_config must be a mapping, got {type(fields).__name__}.")
    if fields.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"quantization_config: quant_method={fields.get('quant_method')!r} is not {QUANT_METHOD!r}.")
    version = fields.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"quantization_config: format_version={version!r} must be a positive integer.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"quantization_config: format_version={version} is newer than {FORMAT_VERSION}, the newest that this "
            "peft_quantlayers reads. Upgrade it: pip install -U peft_quantlayers."
        )
    unknown = (
        set(fields)
        - {"quant_method", "format_version", "specs", "modules"}
        - {name for added_in, name in _ADDED_FIELDS.items() if added_in <= version}
    )
    if unknown:
        raise ValueError(f"quantization_config: unknown field(s) {sorted(map(str, unknown))}.")
    raw_specs, modules = fields.get("specs"), fields.get("modules")
    if not isinstance(raw_specs, list) or not isinstance(modules, Mapping) or not modules:
        raise TypeError("quantization_config: 'specs' must be a list and 'modules' a non-empty mapping.")
    if len(modules) > MAX_MODULES:
        raise ValueError(f"quantization_config: {len(modules)} modules are more than any model has.")
    specs = []
    for position, raw in enumerate(raw_specs):
        try:
            specs.append(spec_from_dict(raw))
        except (TypeError, ValueError) as error:
            raise type(error)(f"quantization_config: specs[{position}]: {error}") from None
    for name, index in modules.items():
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(specs):
            raise ValueError(f"quantization_config: modules[{name!r}]={index!r} is not an index into 'specs'.")
    return {name: specs[index] for name, index in modules.items()}


def branches_from_json(fields: Mapping[str, Any]) -> dict[str, int]:
    """Rank of the low-rank branch of each layer that has one, from what :func:`specs_to_json` wrote.

    Raises:
        TypeError: no mapping of names to integers.
        ValueError: a name that is not a quantized module, or a rank below 1.
    """
    branches = fields.get("branches", {})
    if not isinstance(branches, Mapping):
        raise TypeError("quantization_config: 'branches' must be a mapping of module names to ranks.")
    for name, rank in branches.items():
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"quantization_config: branches[{name!r}]={rank!r} must be an integer.")
        if rank < 1 or name not in fields.get("modules", {}):
            raise ValueError(f"quantization_config: branches[{name!r}]={rank!r} is not a rank of a quantized module.")
    return dict(branches)


def _compute_dtypes_from_json(fields: Mapping[str, Any]) -> dict[str, str]:
    dtypes = fields.get("compute_dtypes", {})
    if not isinstance(dtypes, Mapping):
        raise TypeError("quantization_config: 'compute_dtypes' must be a mapping of module names to dtypes.")
    for name, dtype in dtypes.items():
        if name not in fields.get("modules", {}):
            raise ValueError(f"quantization_config: compute_dtypes[{name!r}] is for no quantized module.")
        check_choice(f"quantization_config: compute_dtypes[{name!r}]", dtype, METADATA_DTYPES)
    return dict(dtypes)
