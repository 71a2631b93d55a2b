"""The names of PEFT that this package uses, apart from those in ``peft.__all__``; all are checked before any is used.

PEFT may move or rename them in a release, and then whatever import or call comes first would fail. Imports PEFT only.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from operator import attrgetter

import peft

# The release series whose names these are; ``pyproject.toml`` allows no other.
TESTED_PEFT = ("0.21.0", "0.22.0")

# Names in modules.
IMPORTED = {
    "peft.mapping": ("PEFT_TYPE_TO_PREFIX_MAPPING",),
    "peft.tuners": ("lora",),
    "peft.tuners.lora": ("Linear", "LoraLayer", "ParamWrapper", "loraga"),
    "peft.tuners.lora.layer": ("Embedding", "LoraVariant", "ParamWrapper"),
    "peft.tuners.lora.loraga": ("estimate_gradients", "get_target_modules"),
    "peft.tuners.lora.model": ("LoraModel",),
    "peft.tuners.lora.variants": ("QALoraLinearVariant",),
    "peft.tuners.tuners_utils": (
        "BaseTuner",
        "BaseTunerLayer",
        "_maybe_include_all_linear_layers",
        "check_adapters_to_merge",
        "check_target_module_exists",
    ),
    "peft.utils": (
        "AuxiliaryTrainingWrapper",
        "CONFIG_NAME",
        "PeftType",
        "SAFETENSORS_WEIGHTS_NAME",
        "WEIGHTS_NAME",
        "hotswap",
        "save_and_load",
    ),
    "peft.utils.hotswap": ("load_peft_weights",),
    "peft.utils.other": ("AuxiliaryTrainingWrapper",),
    "peft.utils.quantization_utils": ("QuantizationBackend",),
    "peft.utils.save_and_load": ("load_peft_weights",),
}

# Methods of their classes that ours call, override or take the place of. One that we override has to be there too: by
# another name PEFT would call its own.
METHODS = {
    "peft.tuners.lora.Linear": ("get_delta_weight", "merge", "unmerge"),
    "peft.tuners.lora.LoraLayer": ("delete_adapter", "resolve_lora_variant", "update_layer"),
    "peft.tuners.lora.ParamWrapper": ("merge", "unmerge", "update_layer"),
    "peft.tuners.lora.model.LoraModel": (
        "_enable_peft_forward_hooks",
        "_inject_parameters",
        "_unload_and_optionally_merge",
        "inject_adapter",
        "merge_adapter",
    ),
    "peft.tuners.lora.variants.QALoraLinearVariant": ("merge_safe",),
    "peft.tuners.tuners_utils.BaseTuner": (
        "_check_target_module_compatiblity",
        "_check_target_module_exists",
        "_create_and_replace",
        "_get_tied_target_modules",
        "_prepare_adapter_config",
        "_prepare_model",
        "_replace_module",
        "merge_adapter",
        "merge_and_unload",
    ),
    "peft.tuners.tuners_utils.BaseTunerLayer": (
        "_get_available_adapters",
        "adapter_layer_names",
        "merge",
        "set_adapter",
        "unmerge",
    ),
    "peft.utils.quantization_utils.QuantizationBackend": ("get_base_weight", "set_base_weight", "supports_merge"),
    "peft.PeftConfig": ("from_pretrained", "save_pretrained", "to_dict"),
    "peft.PeftModel": ("from_pretrained", "load_adapter", "save_pretrained"),
    "peft.PeftMixedModel": ("from_pretrained", "load_adapter"),
}


def missing_names(table: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Those of ``table`` that the installed PEFT does not have, with their modules and classes."""
    missing = []
    for owner, names in table.items():
        try:
            found = _find(owner)
        except (ImportError, AttributeError):
            missing.append(owner)
            continue
        missing += [f"{owner}.{name}" for name in names if not (hasattr(found, name) or _is_module(owner, name))]
    return missing


def check_imports() -> None:
    """Check that PEFT has the names that modules of this package import.

    Raises:
        ImportError: it lacks some of them; names these, and the methods that it lacks.
    """
    if missing_names(IMPORTED):
        raise _error()


def check_names() -> None:
    """Check that PEFT has all that :func:`.peft.register` needs.

    Raises:
        ImportError: all names that it lacks.
    """
    if missing_names(IMPORTED) or missing_names(METHODS):
        raise _error()


def _error() -> ImportError:
    missing = ", ".join(missing_names(IMPORTED) + missing_names(METHODS))
    return ImportError(
        f"peft {peft.__version__} lacks what peft_quantlayers uses: {missing}. Install peft>={TESTED_PEFT[0]},"
        f"<{TESTED_PEFT[1]}. Nothing was registered with PEFT."
    )


def _is_module(owner: str, name: str) -> bool:
    """Whether ``owner`` is a package with this module, which may not be an attribute before it is imported."""
    try:
        return importlib.util.find_spec(f"{owner}.{name}") is not None
    except ModuleNotFoundError:  # owner is no package
        return False


def _find(path: str) -> object:
    """A module, or a class in one."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return attrgetter(name)(importlib.import_module(module))
