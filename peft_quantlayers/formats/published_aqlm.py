"""The published AQLM format: one scheme for the whole model, and the names of the layers that are left dense.

The tensors of such a checkpoint (``codes``, ``codebooks``, ``scales``) are those of our own AQLM layers, so nothing
is converted. The ``aqlm`` package reads what is written here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from .checkpoint_format import CheckpointFormat, CheckpointTensors, ModelDescription, SpecFromDict

SCHEME = ("in_group_size", "out_group_size", "num_codebooks", "nbits_per_codebook")
_PARTS = ("codes", "codebooks", "scales")


class PublishedAqlmFormat(CheckpointFormat):
    """``{"quant_method": "aqlm", <scheme>, "linear_weights_not_to_quantize": [names]}``."""

    name = "aqlm"

    def can_hold(self, description: ModelDescription) -> str | None:
        methods = {spec.method for spec in description.specs.values()}
        if methods != {"aqlm"}:
            return f"it holds AQLM layers only, not {sorted(methods - {'aqlm'})}."
        if len({_scheme(spec) for spec in description.specs.values()}) > 1:
            return "it has one scheme for all layers, and these have several."
        if any(getattr(spec, "row_parts", 1) > 1 for spec in description.specs.values()):
            return "its layers have one set of codebooks, and these have row_parts with codebooks of their own."
        if description.compute_dtype is not None:
            return f"it has no field for compute_dtype={description.compute_dtype!r}."
        if description.compute_dtypes:
            return f"it has no field for a compute dtype of {next(iter(description.compute_dtypes))} alone."
        if description.branches:
            return f"it has no low-rank branches, and {next(iter(description.branches))} has one."
        if description.stacks:
            return f"it has no fused experts, and {next(iter(description.stacks))} holds some."
        if description.lossy_in_model_dtype:
            layer = description.lossy_in_model_dtype[0]
            return f"the aqlm package casts scales to the model's dtype, which cannot hold those of {layer}."
        return None

    def write(self, description: ModelDescription) -> dict[str, Any]:
        scheme = dict(zip(SCHEME, _scheme(next(iter(description.specs.values()))), strict=True))
        # Both spellings: readers before transformers 5 compare with parameter names, later ones with module names.
        names = [spelling for name in description.dense_linears for spelling in (name, f"{name}.weight")]
        return {"quant_method": self.name, **scheme, "linear_weights_not_to_quantize": names}

    def read(
        self, fields: Mapping[str, Any], tensors: CheckpointTensors, *, spec_from_dict: SpecFromDict
    ) -> ModelDescription:
        """As :meth:`CheckpointFormat.read`. The layers are those that the file has codes for.

        ``linear_weights_not_to_quantize`` is not needed: published lists say ``lm_head.weight`` where transformers 5
        compares with ``lm_head``, and so quantizes a head that has no codes.
        """
        missing = [name for name in SCHEME if name not in fields]
        if missing:
            raise ValueError(f"quantization_config of quant_method 'aqlm' lacks {missing}.")
        scheme = {"method": "aqlm"} | {name: fields[name] for name in SCHEME}
        specs = {}
        for name in _layer_names(tensors.headers):
            dtype = str(tensors.headers[f"{name}.codebooks"].dtype).removeprefix("torch.")
            specs[name] = spec_from_dict(scheme | {"scale_dtype": dtype})
        return ModelDescription(specs=specs)


def _scheme(spec: Any) -> tuple[Any, ...]:
    return tuple(getattr(spec, name) for name in SCHEME)


def _layer_names(keys: Iterable[str]) -> list[str]:
    """Names of the layers that a checkpoint holds any AQLM tensor of; ValueError where one lacks another."""
    stored = [key.rpartition(".") for key in keys]
    found = {(name, part) for name, _, part in stored if part in _PARTS}
    if not any(part == "codes" for _, part in found):
        raise ValueError('the checkpoint says quant_method "aqlm" but holds no codes: it is not quantized.')
    names = sorted({name for name, _ in found})
    missing = [f"{name}.{part}" for name in names for part in _PARTS if (name, part) not in found]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensor(s) of quantized layers, for example {missing[:3]}. Download "
            "or save it again."
        )
    return names
