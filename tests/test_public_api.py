"""The public surface is a decision: a change to it changes this list."""

import inspect

import pytest

import peft_quantlayers

PUBLIC = [
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


def test_the_public_surface_is_the_committed_list():
    assert peft_quantlayers.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_exists_and_says_what_it_is(name):
    thing = getattr(peft_quantlayers, name)
    doc = inspect.getdoc(thing) if not inspect.isclass(thing) else thing.__doc__
    assert doc
    # dataclasses make a docstring out of their signature where none is written
    assert not doc.startswith(f"{name}(")


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_methods_that_our_classes_add_have_docstrings(name):
    thing = getattr(peft_quantlayers, name)
    if inspect.isclass(thing):
        for attribute, value in vars(thing).items():
            is_inherited = any(hasattr(base, attribute) for base in thing.__bases__)
            if inspect.isfunction(value) and not attribute.startswith("_") and not is_inherited:
                assert inspect.getdoc(getattr(thing, attribute)), f"{name}.{attribute}"


def test_what_registered_methods_bring_is_listed_too():
    names = set(dir(peft_quantlayers))
    assert names >= {*PUBLIC, "NF4Config", "NF4Linear", "NF4Spec", "__version__"}
    assert all(getattr(peft_quantlayers, name) is not None for name in names - {"__spec__"})
