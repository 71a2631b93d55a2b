"""The ``quantization_config`` of published AQLM checkpoints: one scheme for the whole model, and who is left out.

The tensors of such a checkpoint (``codes``, ``codebooks``, ``scales``) are those of our own AQLM layers, so nothing
is converted; reading and writing the scheme is all there is to do.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from .spec import QuantSpec

SCHEME = ("in_group_size", "out_group_size", "num_codebooks", "nbits_per_codebook")


def read_aqlm_scheme(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of :data:`SCHEME` from a published config.

    Raises:
        ValueError: one of them is missing. (Their values are checked by the spec that is made from them.)
    """
    missing = [name for name in SCHEME if name not in fields]
    if missing:
        raise ValueError(f"quantization_config of quant_method 'aqlm' lacks {missing}.")
    return {name: fields[name] for name in SCHEME}


def aqlm_config(specs: Iterable[QuantSpec], dense_linears: Iterable[str]) -> dict[str, Any] | None:
    """The published form of a model whose quantized layers all have one AQLM scheme; None for any other model.

    Args:
        specs: of all quantized layers.
        dense_linears: names of the modules that are not quantized and could be. Both spellings are written: readers
            before transformers 5 compare with parameter names, later ones with module names.
    """
    specs = list(specs)
    schemes = {tuple(getattr(spec, name, None) for name in SCHEME) for spec in specs}
    if any(spec.method != "aqlm" for spec in specs) or len(schemes) != 1:
        return None
    names = [spelling for name in dense_linears for spelling in (name, f"{name}.weight")]
    scheme = dict(zip(SCHEME, schemes.pop(), strict=True))
    return {"quant_method": "aqlm", **scheme, "linear_weights_not_to_quantize": names}
