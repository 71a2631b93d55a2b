"""Our own format: the quantization part of ``config.json``, which says how each module is stored.

``{"quant_method": "quantlayers", "format_version": 1, "specs": [...], "modules": {name: index into specs}}``, with
``"compute_dtype"`` where the layers compute in another dtype than the model's. Later versions add:

2. ``"branches": {name: rank}``, the layers that have a low-rank branch.
3. ``"compute_dtypes": {name: dtype}``, the layers that compute in another dtype than the rest.
4. ``"sentinels": true``: beside its tensors each layer may have one named ``weight``, of :data:`SENTINEL_SHAPE`, which
   means nothing here and stops programs that do not know this format.
5. ``"stacks": {name: index into specs}``, fused weights of experts by the name of the parameter. Their tensors have
   the expert as first dimension.
6. Fields of specs that older readers do not know (:attr:`QuantSpec.format_version`).
7. More of them: ``row_parts`` of AQLM, ``double_quant`` of HQQ.
8. ``"embeddings": {name: index into specs}``, embedding tables. A layer that the model ties to one, such as a head,
   has no tensors of its own.

Readers accept every format version up to their own; writers write the oldest that says everything, so that older
readers read what they can.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from ..arguments import check_choice
from .checkpoint_format import CheckpointFormat, CheckpointTensors, ModelDescription, SpecFromDict
from .quant_spec import METADATA_DTYPES, QuantSpec

FORMAT_VERSION = 8
# The fields that each version added.
_ADDED_FIELDS = {2: "branches", 3: "compute_dtypes", 5: "stacks", 8: "embeddings"}
# Those of them that name layers, as ``modules`` does.
_KINDS = ("stacks", "embeddings")
_SENTINELS, _SENTINELS_VERSION = "sentinels", 4
SENTINEL_SHAPE = (1,)
# The name under which transformers finds our quantizer and our checkpoints.
QUANT_METHOD = "quantlayers"
MAX_MODULES = 1_000_000


class QuantlayersFormat(CheckpointFormat):
    """Any model of layers of registered methods."""

    name = QUANT_METHOD

    def can_hold(self, description: ModelDescription) -> str | None:
        return None

    def write(self, description: ModelDescription) -> dict[str, Any]:
        kinds = {"stacks": description.stacks, "embeddings": description.embeddings}
        fields = specs_to_json(description.specs, description.branches, description.compute_dtypes, **kinds)
        if description.has_sentinels:
            fields |= {_SENTINELS: True, "format_version": max(fields["format_version"], _SENTINELS_VERSION)}
        dtype = description.compute_dtype
        return fields if dtype is None else fields | {"compute_dtype": dtype}

    def read(
        self, fields: Mapping[str, Any], tensors: CheckpointTensors, *, spec_from_dict: SpecFromDict
    ) -> ModelDescription:
        fields = dict(fields)
        compute_dtype = fields.pop("compute_dtype", None)
        if compute_dtype is not None:
            check_choice("quantization_config: compute_dtype", compute_dtype, METADATA_DTYPES)
        has_sentinels = fields.pop(_SENTINELS, False)
        check_choice("quantization_config: sentinels", has_sentinels, (False, True))
        specs = specs_from_json(fields, spec_from_dict)
        return ModelDescription(
            specs=specs,
            compute_dtype=compute_dtype,
            compute_dtypes=_compute_dtypes_from_json(fields),
            branches=branches_from_json(fields),
            stacks=tuple(fields.get("stacks", ())),
            embeddings=tuple(fields.get("embeddings", ())),
            has_sentinels=has_sentinels,
        )


def specs_to_json(
    specs: Mapping[str, QuantSpec],
    branches: Mapping[str, int] | None = None,
    compute_dtypes: Mapping[str, str] | None = None,
    stacks: Collection[str] = (),
    embeddings: Collection[str] = (),
) -> dict[str, Any]:
    """The JSON form of module names and their specs, each distinct spec written once, with the ranks of branches and
    the compute dtypes of single layers. ``stacks`` are the names that are fused weights of experts, ``embeddings``
    those of embedding tables."""
    distinct = list(dict.fromkeys(specs.values()))
    indices = {name: distinct.index(spec) for name, spec in specs.items()}
    given = {
        "branches": branches,
        "compute_dtypes": compute_dtypes,
        "stacks": {name: index for name, index in indices.items() if name in stacks},
        "embeddings": {name: index for name, index in indices.items() if name in embeddings},
    }
    added = {name: dict(values) for name, values in given.items() if values}
    versions = [version for version, name in _ADDED_FIELDS.items() if name in added]
    return added | {
        "quant_method": QUANT_METHOD,
        "format_version": max([1, *versions, *(spec.format_version for spec in distinct)]),
        "specs": [spec.to_dict() for spec in distinct],
        "modules": {name: index for name, index in indices.items() if name not in {*stacks, *embeddings}},
    }


def specs_from_json(fields: Any, spec_from_dict: SpecFromDict) -> dict[str, QuantSpec]:
    """Names and specs of modules and stacks, from what :func:`specs_to_json` wrote, every value checked.

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
    others = {kind: fields.get(kind, {}) for kind in _KINDS}
    for kind, named in others.items():
        if not isinstance(named, Mapping):
            raise TypeError(f"quantization_config: {kind!r} must be a mapping of names to indices.")
    if not isinstance(raw_specs, list) or not isinstance(modules, Mapping) or not (modules or any(others.values())):
        raise TypeError("quantization_config: 'specs' must be a list and 'modules' a non-empty mapping.")
    counts = Counter(name for named in (modules, *others.values()) for name in named)
    if twice := sorted(str(name) for name, count in counts.items() if count > 1):
        kinds = ", ".join(map(repr, ("modules", *_KINDS)))
        raise ValueError(f"quantization_config: {twice[:3]} are named in several of {kinds}.")
    if len(counts) > MAX_MODULES:
        raise ValueError(f"quantization_config: {len(counts)} modules are more than any model has.")
    specs = []
    for position, raw in enumerate(raw_specs):
        try:
            specs.append(spec_from_dict(raw))
        except (TypeError, ValueError) as error:
            raise type(error)(f"quantization_config: specs[{position}]: {error}") from None
    for field, named in {"modules": modules, **others}.items():
        for name, index in named.items():
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(specs):
                raise ValueError(f"quantization_config: {field}[{name!r}]={index!r} is not an index into 'specs'.")
    return {name: specs[index] for named in (modules, *others.values()) for name, index in named.items()}


def _quantized_names(fields: Mapping[str, Any]) -> set[str]:
    return {name for kind in ("modules", *_KINDS) for name in fields.get(kind, {})}


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
        if rank < 1 or name not in _quantized_names(fields):
            raise ValueError(f"quantization_config: branches[{name!r}]={rank!r} is not a rank of a quantized module.")
    return dict(branches)


def _compute_dtypes_from_json(fields: Mapping[str, Any]) -> dict[str, str]:
    dtypes = fields.get("compute_dtypes", {})
    if not isinstance(dtypes, Mapping):
        raise TypeError("quantization_config: 'compute_dtypes' must be a mapping of module names to dtypes.")
    for name, dtype in dtypes.items():
        if name not in _quantized_names(fields):
            raise ValueError(f"quantization_config: compute_dtypes[{name!r}] is for no quantized module.")
        check_choice(f"quantization_config: compute_dtypes[{name!r}]", dtype, METADATA_DTYPES)
    return dict(dtypes)
