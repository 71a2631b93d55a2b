"""Names of before work, with a warning: attributes of public classes, and modules."""

import copyreg
import importlib
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_quantlayers as pql
from peft_quantlayers.merging.merge_rules import requantize
from peft_quantlayers.methods import get_method
from peft_quantlayers.old_names import MOVED_MODULES, PACKAGE, OldName

# What the packages that were renamed gave.
OF_ADAPTERS = {
    "LayerMergeReport", "LoraQuantizedLinear", "MergeAwareCallback", "MergeAwareLoraConfig", "MergeReport",
    "QuantScalesConfig", "QuantScalesLayer", "QuantScalesLinear", "QuantScalesNorm", "enable_merge_aware",
    "fuse_projections", "has_adapters", "merge_back", "set_merge_strategy",
}  # fmt: skip
OF_QUANTIZERS = {
    "AQLMConfig", "AQLMMethod", "AQLMSpec", "HQQConfig", "HQQMethod", "HQQSpec", "QuantConfig", "QuantMethod",
    "get_method", "move_aqlm_codes", "register_method", "registered_methods", "spec_from_dict",
}  # fmt: skip


@pytest.mark.parametrize(("package", "names"), [("adapters", OF_ADAPTERS), ("quantizers", OF_QUANTIZERS)])
def test_the_public_names_of_a_renamed_package_are_those_of_its_successors(package, names):
    module = importlib.import_module(f"{PACKAGE}.{package}")
    for name in names:
        with pytest.warns(DeprecationWarning, match=rf"{package}\.{name} is now {PACKAGE}\..*\.{name};"):
            found = getattr(module, name)
        assert not hasattr(pql, name) or found is getattr(pql, name)


@pytest.mark.parametrize("old", MOVED_MODULES)
def test_a_renamed_module_names_modules_that_there_are_and_gives_nothing_else(old):
    for new in MOVED_MODULES[old]:
        importlib.import_module(f"{PACKAGE}.{new}")
    module = importlib.import_module(f"{PACKAGE}.{old}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hasattr(module, "__file__")
        with pytest.raises(AttributeError, match=rf"'{PACKAGE}\.{old}' has no attribute 'NoSuchName'"):
            _ = module.NoSuchName


@pytest.mark.parametrize(
    ("module", "value"),
    # By hand: the modules that there were.
    [
        ("quantizers.hqq", pql.HQQSpec(nbits=3)),
        ("quantizers.aqlm", pql.AQLMSpec()),
        ("quantizers.config", pql.HQQConfig(nbits=3, overrides={"q_proj": {"nbits": 4}})),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_pickle_that_names_the_old_module_of_a_value_loads(module, value):
    # Protocol 0 holds names as lines of text.
    now = f"c{type(value).__module__}\n{type(value).__name__}\n".encode()
    pickled = pickle.dumps(value, protocol=0)
    assert now in pickled
    pickled = pickled.replace(now, f"c{PACKAGE}.{module}\n{type(value).__name__}\n".encode())
    with pytest.warns(DeprecationWarning, match=f"{module}.{type(value).__name__} is now"):
        assert pickle.loads(pickled) == value


def test_a_layer_that_an_earlier_version_pickled_is_refused_with_the_way_out():
    layer = pql.QuantizedLinear.from_linear(nn.Linear(64, 8), pql.HQQSpec(), layer_name="model.q_proj")
    state = vars(layer).copy()
    del state["_tensor_names"]
    with pytest.raises(TypeError, match=r"model\.q_proj.*earlier version.*save_model"):
        copyreg.__newobj__(type(layer)).__setstate__(state)


def test_old_methods_of_layers_and_methods_are_the_new_ones():
    method, spec, x = get_method("hqq"), pql.HQQSpec(group_size=16), torch.randn(2, 64)
    model = pql.quantize_model(nn.Sequential(nn.Linear(64, 48)), pql.HQQConfig(group_size=16), progress=False)
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"]))
    layer = adapted.base_model.model[0]
    base = layer.get_base_layer()

    def old(holder: object, name: str) -> object:
        with pytest.warns(DeprecationWarning, match=f"^{name} is now"):
            return getattr(holder, name)

    assert torch.equal(old(method, "dense")(base.quantized_weight), base.dequantize(torch.float32))
    assert old(method, "shift_group_size")(spec, in_features=64) == 16
    assert old(base, "as_frozen")(x, []) is not None
    factors = torch.zeros(48, 1), torch.zeros(1, 64)
    torch.testing.assert_close(old(base, "forward_with_update")(x, *factors), base(x))
    before = base.codes
    old(base, "own_parameters")()
    assert base.codes is not before
    snapshot = old(layer, "merge_state")()
    old(layer, "merge_with")(requantize, ["default"])
    assert layer.merged
    assert old(layer, "report_again")().layer_name == "0"
    layer.restore(snapshot)
    assert not layer.merged
    assert old(layer, "as_frozen")(x) is not None


def test_an_old_name_is_read_only_by_those_who_use_it():
    """Looking at a class, as documentation tools do, warns of nothing."""
    for cls in (pql.QuantizedLinear, pql.LoraQuantizedLinear, pql.QuantMethod, pql.MergeReport):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = [name for name in dir(cls) if isinstance(getattr(cls, name), OldName)]
        assert found
        assert all(hasattr(cls, getattr(cls, name).new) for name in found)
