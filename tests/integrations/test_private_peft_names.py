"""The names of PEFT that we use are all in one table, and a PEFT without some of them gives one clear error."""

import ast
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

import peft_quantlayers as pql
from peft_quantlayers.integrations import peft as integration
from peft_quantlayers.integrations.private_peft_names import IMPORTED, METHODS, check_imports, check_names

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


def test_every_function_that_registering_takes_over_is_in_the_table():
    listed = {name for names in (*METHODS.values(), *IMPORTED.values()) for name in names}
    # Where a dispatcher cannot be registered this one is needed, and the error says what else can be done.
    assert integration._replaced.names() - {"_create_new_module"} <= listed


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
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: peft ")
    assert "variants.QALoraLinearVariant" in error
    assert "loraga.get_target_modules" in error
