"""The registry of dense module types: which are there, which of transformers' are left out and why, and new ones."""

import pickle
import re
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from programs import run_program
from torch import nn
from transformers.models.esm.modeling_esmfold import EsmFoldLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from peft_quantlayers import HQQConfig, HQQSpec, dequantize_model, quantize_model, quantized_modules
from peft_quantlayers.layers import DenseType, dense_types, quantize_module, register_dense_type
from peft_quantlayers.layers.dense_types import dense_at, dense_type_of
from peft_quantlayers.layers.replace import place_empty_layer

ROUTES = "forward routes tokens: it returns more than the product"
OWN_FORMAT = "a quantized layer already, in another format"
# Every class in transformers 5.24 that derives from nn.Linear and is not registered.
LEFT_DENSE = {
    "Llama4Router": ROUTES,
    "PhimoeTopKRouter": ROUTES,
    "DeepseekV4GroupedLinear": "forward multiplies each group of inputs by its own rows of the weight",
    "DoryLMHead": "forward multiplies each output by a parameter of its own",
    "IdeficsDecoupledLinear": "forward may append the outputs of a second, trainable layer",
    "AutoBitLinear": OWN_FORMAT,
    "CompressedTensorsFP8Linear": OWN_FORMAT,
    "FP8Linear": OWN_FORMAT,
    "FbgemmFp8Linear": OWN_FORMAT,
    "MetalLinear": OWN_FORMAT,
    "QuantizedLinear": OWN_FORMAT,
}


def test_every_subclass_of_linear_in_transformers_is_registered_or_left_out_for_a_reason():
    source = Path(transformers.__file__).parent
    declared = re.compile(r"^class (\w+)\((?:torch\.)?nn\.Linear\)", re.MULTILINE)
    found = {name for file in source.rglob("*.py") for name in declared.findall(file.read_text(encoding="utf-8"))}
    registered = {path.partition(":")[2] for path in dense_types._dense_types}
    missing = set() if Version(transformers.__version__) >= Version("5.24") else {"DoryLMHead"}
    assert found - registered == set(LEFT_DENSE) - missing
    assert not registered & set(LEFT_DENSE)


CASES = [
    (nn.Linear, lambda: nn.Linear(32, 48)),
    (Conv1D, lambda: Conv1D(48, 32)),
    (FalconLinear, lambda: FalconLinear(32, 48)),
    (EsmFoldLinear, lambda: EsmFoldLinear(32, 48)),
]


WITHOUT_BIAS = [(cls, lambda cls=cls: cls(32, 48, bias=False)) for cls in (nn.Linear, FalconLinear, EsmFoldLinear)]


@pytest.mark.parametrize(("module_type", "create"), CASES + WITHOUT_BIAS)
def test_an_entry_reads_its_module_as_x_times_weight_and_rebuilds_the_same_module(module_type, create):
    module = create().eval()
    if module.bias is not None:
        nn.init.normal_(module.bias)
    model = nn.Sequential(module)
    found, entry = dense_at(model, "0")
    assert found is module
    assert entry.shape(module) == (48, 32)
    x = torch.randn(3, 5, 32)
    expected = nn.functional.linear(x, entry.weight(module), module.bias)
    torch.testing.assert_close(module(x), expected)
    rebuilt = entry.rebuild(entry.weight(module), module.bias, is_training=False)
    assert type(rebuilt) is module_type
    assert rebuilt.bias is module.bias
    assert not rebuilt.training
    assert torch.equal(rebuilt(x), module(x))


@pytest.mark.parametrize(("module_type", "create"), CASES)
def test_a_quantized_module_comes_back_as_its_own_type(module_type, create):
    model = quantize_model(nn.Sequential(create()), HQQConfig(group_size=16), progress=False)
    x = torch.randn(3, 5, 32)
    y = model(x)
    model = pickle.loads(pickle.dumps(model))
    dequantize_model(model)
    assert type(model[0]) is module_type
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize(("module_type", "create"), CASES)
def test_a_layer_placed_for_loading_knows_the_type_that_it_replaces(module_type, create):
    model = nn.Sequential(create())
    layer = place_empty_layer(model, "0", HQQSpec(group_size=16), compute_dtype=None, device="cpu")
    assert (layer.out_features, layer.in_features) == (48, 32)
    assert layer.dense_type.path.endswith(f":{module_type.__name__}")


def test_a_subclass_is_not_of_the_type_of_its_base():
    class Turned(Conv1D):
        def forward(self, x):
            return super().forward(x).flip(-1)

    assert dense_type_of(Turned(4, 4)) is None
    Turned.__module__, Turned.__qualname__ = Conv1D.__module__, Conv1D.__qualname__
    assert dense_type_of(Turned(4, 4)) is None  # nor by taking its name


def test_attention_projections_that_torch_multiplies_itself_are_left_dense():
    attention = nn.MultiheadAttention(32, 4)  # reads out_proj.weight and never calls out_proj
    assert dense_type_of(attention.out_proj) is None


class Doubled(nn.Module):
    """A layer type of a user's own, with the weight under nn.Linear's names."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.randn(out_features)) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t() + self.bias


def test_a_registered_type_of_a_users_own_is_quantized(monkeypatch):
    monkeypatch.setattr(dense_types, "_dense_types", dict(dense_types._dense_types))
    model = nn.Sequential(Doubled(32, 48))
    with pytest.raises(ValueError, match=r"0: a Doubled is not a dense layer.*register_dense_type"):
        quantize_module(model, "0", HQQSpec(group_size=16))
    register_dense_type(DenseType(path=f"{__name__}:Doubled"))
    quantize_model(model, HQQConfig(group_size=16), progress=False)
    assert list(quantized_modules(model)) == ["0"]
    assert type(dequantize_model(model)[0]) is Doubled


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (DenseType(path="Linear"), "must be 'module:Class'"),
        (DenseType(path="transformers.pytorch_utils:Conv1D"), "registered already, as .*is_transposed=True"),
    ],
)
def test_a_wrong_or_second_entry_is_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        register_dense_type(entry)


def test_importing_the_package_loads_no_model_file():
    lazy = [path.partition(":")[0] for path in dense_types._dense_types if ".models." in path]
    assert lazy
    program = f"import sys, peft_quantlayers\nassert not set({lazy}) & set(sys.modules)"
    done = run_program("-c", program)
    assert done.returncode == 0, done.stderr
