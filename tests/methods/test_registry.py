"""The registry of methods: what is found without an edit elsewhere, and what is refused."""

import os
import shutil
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from every_method import AbsmaxMethod, AbsmaxSpec
from programs import run_program

import peft_quantlayers
import quantlayers_kernels
from peft_quantlayers.methods import HQQMethod, get_method, register_method, registered_methods, registry

METHOD = """
from dataclasses import dataclass

import torch

from peft_quantlayers.formats import QuantizedWeight, QuantSpec, TensorLayout
from peft_quantlayers.methods.base import QuantMethod
from peft_quantlayers.methods.quant_config import make_config
from peft_quantlayers.methods.registry import register_method


@dataclass(frozen=True, kw_only=True)
class {Name}Spec(QuantSpec):
    method = "{name}"

    def tensor_layout(self, out_features, in_features):
        return {{"codes": TensorLayout(shape=(out_features, in_features), dtype=torch.int8, role="codes")}}


{Name}Config = make_config({Name}Spec)


class {Name}Method(QuantMethod[{Name}Spec]):
    spec_type = {Name}Spec

    def quantize(self, weight, spec, *, hessian=None, start=None, iterations=None):
        tensors = {{"codes": (weight * 100).round().clamp(-127, 127).to(torch.int8)}}
        return QuantizedWeight(spec=spec, out_features=len(weight), in_features=weight.shape[1], tensors=tensors)

    def dequantize(self, weight, *, dtype=torch.float32):
        return (weight.tensors["codes"] * 0.01).to(dtype)
"""
# Run where the two methods are installed.
USER = """
import pickle

import torch
from torch import nn

import peft_quantlayers as pql

for name in ("Third", "Fourth"):
    config = getattr(pql, name + "Config")(skip_modules=["1"])
    assert pickle.loads(pickle.dumps(config)) == config
    model = pql.quantize_model(nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 2)), config, progress=False)
    assert type(model[0]) is getattr(pql, name + "Linear")
    assert type(model[0].spec) is getattr(pql, name + "Spec")
    assert type(model[1]) is nn.Linear
    x = torch.randn(3, 8)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
print(*sorted(pql.registered_methods()))
"""


def test_a_file_in_the_folder_and_an_entry_point_are_found_without_an_edit_elsewhere(tmp_path):
    package = tmp_path / "peft_quantlayers"
    shutil.copytree(Path(peft_quantlayers.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    third = METHOD.format(name="third", Name="Third") + "\n\nregister_method(ThirdMethod())\n"
    (package / "methods" / "third.py").write_text(third)

    (tmp_path / "fourth_package.py").write_text(METHOD.format(name="fourth", Name="Fourth"))
    info = tmp_path / "fourth_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fourth-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINT_GROUP}]\nfourth = fourth_package:FourthMethod\n")

    path = [tmp_path, Path(quantlayers_kernels.__file__).parents[1], os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(entry) for entry in path if entry)}
    done = run_program("-c", USER, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == sorted([*registered_methods(), "fourth", "third"])


@pytest.fixture
def entry_points(monkeypatch) -> list[EntryPoint]:
    """Entry points in the place of those of installed packages, read on the next look at the registry."""
    found: list[EntryPoint] = []
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    monkeypatch.setattr(registry, "_pending", None)
    monkeypatch.setattr(registry, "entry_points", lambda *, group: [each for each in found if each.group == group])
    return found


def entry_point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name=name, value=value, group=registry.ENTRY_POINT_GROUP)


class Impostor(HQQMethod):
    """Another class for a name that is taken."""


class NoMethod:
    """A class that is not a method."""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_package:Method", "No module named 'no_such_package'"),
        ("every_method:NoSuchClass", "has no attribute 'NoSuchClass'"),
        ("every_method:QUICK", "'dict' object is not callable"),
        (f"{__name__}:NoMethod", "register_method takes a QuantMethod, got NoMethod"),
        (f"{__name__}:Impostor", "a quantization method named 'hqq' is registered already"),
    ],
)
def test_an_entry_point_that_gives_no_method_is_named_and_the_others_work(entry_points, caplog, value, message):
    entry_points += [entry_point("broken", value), entry_point("toy", "every_method:AbsmaxMethod")]
    assert peft_quantlayers.AbsmaxSpec is AbsmaxSpec
    assert type(registered_methods()["hqq"]) is HQQMethod
    assert len(caplog.records) == 1  # entry points are read once
    assert caplog.messages[0].startswith(f"method 'broken' ({value}) was not loaded: ")
    assert message in caplog.messages[0]


def test_after_an_unexpected_error_the_other_entry_points_are_still_loaded(entry_points, monkeypatch):
    class Failing(HQQMethod):
        def __init__(self) -> None:
            raise RuntimeError("no driver")

    monkeypatch.setattr(sys.modules[__name__], "NoMethod", Failing)
    entry_points += [entry_point("failing", f"{__name__}:NoMethod"), entry_point("toy", "every_method:AbsmaxMethod")]
    with pytest.raises(RuntimeError, match="no driver"):
        registered_methods()
    assert "toy_absmax" in registered_methods()


def test_a_package_may_ask_for_the_methods_while_it_is_loaded(entry_points, monkeypatch, caplog):
    class Asking(AbsmaxMethod):
        def __init__(self) -> None:
            assert "hqq" in registered_methods()

    monkeypatch.setattr(sys.modules[__name__], "NoMethod", Asking)
    entry_points.append(entry_point("asking", f"{__name__}:NoMethod"))
    assert type(registered_methods()["toy_absmax"]) is Asking
    assert not caplog.records


def test_an_unknown_name_is_looked_for_in_entry_points_and_then_refused_with_those_that_there_are(entry_points):
    entry_points.append(entry_point("toy", "every_method:AbsmaxMethod"))
    assert get_method("toy_absmax").spec_type.method == "toy_absmax"
    with pytest.raises(ValueError, match=r"unknown quantization method 'nonesuch'; known are .*'hqq'.*'toy_absmax'"):
        get_method("nonesuch")


def test_hqq_is_registered_and_registering_it_again_is_harmless():
    assert isinstance(get_method("hqq"), HQQMethod)
    register_method(HQQMethod())
    assert list(registered_methods()).count("hqq") == 1


def test_another_method_of_the_same_name_is_refused():
    with pytest.raises(ValueError, match="'hqq' is registered already"):
        register_method(Impostor())


def test_the_registry_cannot_be_changed_from_outside():
    registered_methods().clear()
    assert "hqq" in registered_methods()
