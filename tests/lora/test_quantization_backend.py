"""Our backend for PEFT's generic tuners, and PEFT's registries, where it has them (`patches/`)."""

import copy
import importlib
import pickle
import re
from pathlib import Path

import peft
import peft.utils
import pytest
import torch
from every_method import all_methods, quick_config
from peft import BOFTConfig, LoraConfig, MissConfig, OFTConfig, PeftModel, ShiraConfig, VeraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

import peft_quantlayers as pql
from peft_quantlayers import LoraQuantizedLinear
from peft_quantlayers.integrations import peft as integration
from peft_quantlayers.lora.quantization_backend import QuantizedLinearBackend

from .surfaces import Two

# Its table "What stays with all patches" has a row for each function of PEFT that is extended whatever PEFT has.
PATCHES = Path(__file__).parent.parent.parent / "patches" / "README.md"
HAS_REGISTRIES = hasattr(peft.utils, "register_quantization_backend")
TUNERS = {
    "boft": lambda: BOFTConfig(boft_block_size=4, init_weights=False),
    "miss": lambda: MissConfig(r=4, init_weights=False),
    "oft": lambda: OFTConfig(oft_block_size=4, init_weights=False),
    "shira": lambda: ShiraConfig(r=4, init_weights=False),
    "vera": lambda: VeraConfig(r=4, init_weights=False),
}
tuners = pytest.mark.parametrize("tuner", TUNERS)


def asks_for_backends(tuner: str) -> bool:
    """Whether this PEFT has moved the tuner to the generic backends; OFT is there since 0.21."""
    return hasattr(importlib.import_module(f"peft.tuners.{tuner}.layer"), "resolve_quantization_backend")


def quantized_two(method: str) -> Two:
    return pql.quantize_model(Two(), quick_config(method), progress=False)


def tuned(model: Two, tuner: str) -> PeftModel:
    torch.manual_seed(1)
    config = TUNERS[tuner]()
    config.target_modules = {"first", "second"}
    return get_peft_model(model, config).eval()


def give_backend(model: PeftModel) -> None:
    """What PEFT does where it asks its registry."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.quantization_backend = QuantizedLinearBackend(module.get_base_layer())


@all_methods
@tuners
def test_a_generic_tuner_computes_and_merges_the_same_with_our_backend(method, tuner):
    base = quantized_two(method)
    without, with_it = tuned(copy.deepcopy(base), tuner), tuned(base, tuner)
    give_backend(with_it)
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert torch.equal(with_it(x), without(x))
        for model in (without, with_it):
            model.merge_adapter(safe_merge=model is with_it)
        assert torch.equal(with_it(x), without(x))
        assert torch.equal(with_it.merge_and_unload()(x), without.merge_and_unload()(x))


@all_methods
def test_a_base_weight_is_a_copy_and_is_quantized_when_it_is_set(method):
    layer = tuned(quantized_two(method), "miss").base_model.model.first
    layer.quantization_backend = QuantizedLinearBackend(layer.get_base_layer())
    base = layer.get_base_layer()
    before = base.dequantize()
    weight = layer.get_base_weight()
    assert type(weight) is torch.Tensor
    weight += 1
    assert torch.equal(base.dequantize(), before)
    layer.set_base_weight(weight)
    expected = base.method.quantize(before + 1, base.spec)
    assert torch.equal(layer.get_base_weight(), base.method.dequantize(expected))


def test_a_lora_layer_has_a_backend_that_survives_copy_and_pickle():
    model = get_peft_model(quantized_two("hqq"), LoraConfig(r=2, target_modules=["first"]))
    for candidate in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layer = candidate.base_model.model.first
        assert layer.quantization_backend.backend_name == "quantlayers-hqq"
        assert torch.equal(layer.get_base_weight(), layer.get_base_layer().dequantize())


def test_the_backend_reads_a_layer_that_a_merge_has_made_dense():
    model = get_peft_model(quantized_two("hqq"), LoraConfig(r=2, target_modules=["first"]))
    pql.set_merge_strategy(model, "dense")
    model.merge_adapter()
    layer = model.base_model.model.first
    assert torch.equal(layer.get_base_weight(), layer.get_base_layer().weight)


def test_a_registry_of_backends_is_used_where_peft_has_one(monkeypatch):
    registry = {}
    pql.unregister()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(peft.utils, "register_quantization_backend", registry.__setitem__, raising=False)
            patched.setattr(peft.utils, "unregister_quantization_backend", registry.pop, raising=False)
            pql.register()
            (resolve,) = registry.values()
            backend = resolve(quantized_two("hqq").first, get_apply_tensor_subclass=None)
            assert (type(backend), backend.backend_name) == (QuantizedLinearBackend, "quantlayers-hqq")
            assert resolve(torch.nn.Linear(4, 4)) is None
            pql.unregister()
            assert registry == {}
    finally:
        pql.register()


def test_unregistering_leaves_no_function_of_ours_in_pefts_lora():
    ours = [name for name, value in vars(peft.LoraModel).items() if "quantlayers" in getattr(value, "__module__", "")]
    assert {"merge_adapter", "inject_adapter", "_unload_and_optionally_merge"} <= set(ours)
    pql.unregister()
    try:
        assert all(getattr(peft.LoraModel, name).__module__.startswith("peft.") for name in ours)
        assert "merge_adapter" not in vars(peft.LoraModel)
    finally:
        pql.register()
    assert "merge_adapter" in vars(peft.LoraModel)


def test_what_is_extended_is_what_has_a_reason_in_the_table_and_the_dispatch_where_peft_has_no_registry_for_it():
    rows = re.findall(r"^\| `([\w.]+)` \| (.+) \| (.+) \|$", PATCHES.read_text(), re.M)
    reasons = {name: why for name, _, why in rows if "." in name}
    assert all(reasons.values())
    dispatch = set() if HAS_REGISTRIES else {"LoraModel._create_new_module"}
    assert integration._replaced.names() == reasons.keys() | dispatch


@pytest.mark.skipif(not HAS_REGISTRIES, reason="this PEFT has no registries; `make patches` runs this on one that has")
class TestOnAPeftWithRegistries:
    def test_layers_and_backends_are_registered_through_public_names(self):
        dispatch = peft.LoraModel.__dict__["_create_new_module"].__func__
        assert dispatch.__module__ == "peft.tuners.lora.model"
        assert "register_lora_dispatcher" in peft.tuners.lora.__all__
        assert "register_quantization_backend" in peft.utils.__all__
        lora = get_peft_model(quantized_two("hqq"), LoraConfig(r=2, target_modules=["first"]))
        assert type(lora.base_model.model.first) is LoraQuantizedLinear

    @all_methods
    @pytest.mark.parametrize("tuner", [tuner for tuner in TUNERS if asks_for_backends(tuner)])
    def test_the_status_names_our_backend_and_merging_goes_through_it(self, method, tuner, monkeypatch):
        model = tuned(quantized_two(method), tuner)
        assert {layer.quantization_backend for layer in model.get_layer_status()} == {f"quantlayers-{method}"}
        written = []
        write = QuantizedLinearBackend.set_base_weight
        monkeypatch.setattr(
            QuantizedLinearBackend, "set_base_weight", lambda *args: (written.append(args[1]), write(*args))
        )
        model.merge_adapter()
        assert len(written) == 2

    def test_unregister_leaves_nothing_of_ours_in_peft(self):
        pql.unregister()
        try:
            layer = quantized_two("hqq").first
            assert peft.utils.resolve_quantization_backend(layer) is None
        finally:
            pql.register()
        assert peft.utils.resolve_quantization_backend(layer).backend_name == "quantlayers-hqq"
