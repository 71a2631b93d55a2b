"""Fine-tune language models on the hardware you have: quantize, train adapters, merge back, save.

Importing this package registers it with PEFT and transformers; :func:`unregister` undoes that.
"""

import os
from typing import Any

from quantlayers_cli import by_module as _by_module  # noqa: F401  # first: Ctrl-C from here on

from . import required_versions as _required_versions  # noqa: F401  # then: it checks them
from .bit_allocation import BitPlan, plan_bits
from .calibration import Calibration, LayerResult, sample_calibration_data
from .exports import ExportFormat, ExportReport, LayerExport, export, export_formats
from .formats import QuantizedWeight, QuantSpec, TensorLayout
from .formats.checksums import DamagedTensor
from .integrations import peft as _peft
from .integrations import transformers_registry as _transformers
from .integrations.hqq_package_folder import load_hqq_folder
from .integrations.interrupted_save import undo_interrupted_save
from .integrations.peft_scales import QuantScalesModel
from .integrations.saved_folder import verify_model
from .layers import (
    AQLMLinear,
    HQQLinear,
    QuantizedLinear,
    QuantizedStack,
    RoundedActivations,
    dequantize_model,
    layer_type,
    quantized_modules,
    quantized_stacks,
    set_activation_bits,
)
from .lora import LoraQuantizedLinear, MergeAwareCallback, enable_merge_aware, fuse_projections, set_merge_strategy
from .merging import LayerMergeReport, MergeReport
from .methods import (
    AQLMConfig,
    AQLMSpec,
    HQQConfig,
    HQQSpec,
    QuantConfig,
    QuantMethod,
    config_type,
    register_method,
    registered_methods,
)
from .model import quantize_model
from .model_merge import MergedModel, merge_back, plan_merge_bits
from .old_names import add_old_modules
from .report import ModelSummary, summary
from .saving import save_model
from .scales import Predictions, QuantScalesConfig, TuningResult, record_predictions, tune_scales
from .streaming import quantize_checkpoint
from .training import LoftQResult, PVTuner, initialize_loftq, prepare_model_for_kbit_training
from .transforms import AWQScales, Permutation, Rotation, SmoothQuant, Transform, transform_model

__version__ = "0.1.0"

__all__ = [
    "AQLMConfig",
    "AQLMLinear",
    "AQLMSpec",
    "AWQScales",
    "BitPlan",
    "Calibration",
    "DamagedTensor",
    "ExportFormat",
    "ExportReport",
    "HQQConfig",
    "HQQLinear",
    "HQQSpec",
    "LayerExport",
    "LayerMergeReport",
    "LayerResult",
    "LoftQResult",
    "LoraQuantizedLinear",
    "MergeAwareCallback",
    "MergeReport",
    "MergedModel",
    "ModelSummary",
    "PVTuner",
    "Permutation",
    "Predictions",
    "QuantConfig",
    "QuantMethod",
    "QuantScalesConfig",
    "QuantScalesModel",
    "QuantSpec",
    "QuantizedLinear",
    "QuantizedStack",
    "QuantizedWeight",
    "Rotation",
    "RoundedActivations",
    "SmoothQuant",
    "TensorLayout",
    "Transform",
    "TuningResult",
    "dequantize_model",
    "enable_merge_aware",
    "export",
    "export_formats",
    "fuse_projections",
    "initialize_loftq",
    "load_hqq_folder",
    "merge_back",
    "plan_bits",
    "plan_merge_bits",
    "prepare_model_for_kbit_training",
    "quantize_checkpoint",
    "quantize_model",
    "quantized_modules",
    "quantized_stacks",
    "record_predictions",
    "register",
    "register_method",
    "registered_methods",
    "sample_calibration_data",
    "save_model",
    "set_activation_bits",
    "set_merge_strategy",
    "summary",
    "transform_model",
    "tune_scales",
    "undo_interrupted_save",
    "unregister",
    "verify_model",
]


def register() -> None:
    """Register with PEFT's LoRA dispatch and transformers' quantizers. Importing the package does this."""
    _peft.register()
    _transformers.register()


def unregister() -> None:
    """Restore PEFT's and transformers' own dispatch. Existing models keep working."""
    _peft.unregister()
    _transformers.unregister()


def _of_methods() -> dict[str, type]:
    """Spec, config and layer class of every registered method, by name."""
    found: dict[str, type] = {}
    for method in registered_methods().values():
        spec_type = method.spec_type
        for each in (spec_type, config_type(spec_type), layer_type(spec_type.method)):
            found[each.__name__] = each
    return found


def __getattr__(name: str) -> Any:
    """What registered methods bring, by name: ``peft_quantlayers.NF4Config``."""
    found = {} if name.startswith("__") else _of_methods()
    if name not in found:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_of_methods()})


add_old_modules()
if not os.environ.get("PEFT_QUANTLAYERS_NO_REGISTER"):
    register()
