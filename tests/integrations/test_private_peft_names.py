"""The names of PEFT that we use are all in one table, and a PEFT without some of them gives one clear error."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import peft
import pytest
from peft import LoraModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from programs import run_program

import peft_quantlayers as pql
from peft_quantlayers.integrations import peft as integration
from peft_quantlayers.integrations.private_peft_names import IMPORTED, METHODS, _find, check_imports, check_names

PACKAGE = Path(pql.__file__).parent


def imported_names() -> set[tuple[str, str]]:
    """What modules of ours import from modules of PEFT."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft."):
                found |= {(node.module, alias.name) for alias in node.names}
    return found


def test_every_name_that_is_imported_from_a_module_of_peft_is_in_the_table():
    listed = {(module, name) for module, names in IMPORTED.items() for name in names}
    assert imported_names() <= listed
    assert {"LoraModel", "PeftModel", "PeftMixedModel", "LoraConfig", "PeftConfig"} <= set(peft.__all__)
    assert {"PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING"} <= set(peft.__all__)


def test_every_function_that_registering_takes_over_is_in_the_table():
    methods = {f"{owner.rpartition('.')[2]}.{name}" for owner, names in METHODS.items() for name in names}
    functions = {f"{module}.{name}" for module, names in IMPORTED.items() for name in names}
    # The first has an error of its own, which says what else can be done; the second is transformers'.
    checked_elsewhere = {"LoraModel._create_new_module", "PreTrainedModel.load_adapter"}
    assert integration._replaced.names() - checked_elsewhere <= methods | functions


def overridden_methods() -> set[tuple[type, str]]:
    """Methods of PEFT that classes of ours override, with those classes; ``forward`` is torch's name."""
    found = set()
    for module in pkgutil.walk_packages(pql.__path__, f"{pql.__name__}."):
        if module.name.endswith("__main__"):
            continue
        for ours in vars(importlib.import_module(module.name)).values():
            if not inspect.isclass(ours) or ours.__module__ != module.name:
                continue
            theirs = {name for base in ours.__mro__ if base.__module__.startswith("peft.") for name in vars(base)}
            own = {name for name in vars(ours) if not name.startswith("__") and name not in ("_abc_impl", "forward")}
            found |= {(ours, name) for name in own & theirs}
    return found


def test_every_method_that_a_class_of_ours_overrides_is_in_the_table():
    found = overridden_methods()
    assert {"merge", "_prepare_model", "resolve_lora_variant", "set_base_weight"} <= {name for _, name in found}
    owners = {_find(owner): names for owner, names in METHODS.items()}
    for ours, name in sorted(found, key=str):
        assert any(name in names for owner, names in owners.items() if issubclass(ours, owner)), (ours, name)


def test_a_method_that_ours_override_is_missed_by_its_old_name(monkeypatch):
    monkeypatch.delattr(BaseTuner, "_prepare_model")
    monkeypatch.delattr(LoraModel, "_prepare_model")
    with pytest.raises(ImportError, match=r"lacks .*BaseTuner\._prepare_model.* Nothing was registered"):
        check_names()


def test_the_installed_peft_has_them_all():
    check_names()


def test_all_that_is_missing_is_in_one_error_and_nothing_is_registered(monkeypatch):
    pql.unregister()
    try:
        with monkeypatch.context() as patched:
            patched.delattr(PeftModel, "load_adapter")
            patched.delattr(BaseTunerLayer, "_get_available_adapters")
            check_imports()
            with pytest.raises(ImportError) as caught:
                pql.register()
            for name in (
                "PeftModel.load_adapter",
                "BaseTunerLayer._get_available_adapters",
                "Nothing was registered",
            ):
                assert name in str(caught.value)
            assert not integration._replaced
    finally:
        pql.register()


def test_a_name_that_is_imported_is_missed_before_any_module_needs_it():
    script = (
        "import peft.tuners.lora.variants as variants, peft.tuners.lora as lora\n"
        "del variants.QALoraLinearVariant, lora.loraga.get_target_modules\n"
        "import peft_quantlayers"
    )
    done = run_program("-c", script)
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: peft ")
    assert "variants.QALoraLinearVariant" in error
    assert "loraga.get_target_modules" in error
