"""Imports go down only, private names of peers are used where we said, and an import starts nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
from programs import run_program
from source_checks import PEERS, find_circle, imports, own_names, private_attributes, private_imports, replacements

ROOT = Path(__file__).parents[1]
PACKAGE, KERNELS = ROOT / "peft_quantlayers", ROOT / "kernels" / "quantlayers_kernels"
# Without torch; it comes to the package by name, as `python -m` would.
COMMAND_LINE = ROOT / "quantlayers_cli"
FILES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py"), *COMMAND_LINE.rglob("*.py")])

# Low to high. A module may import its own floor and those below; ``evaluate`` needs no more of ours than the checks of
# arguments, and all may use it.
# The longest name that fits decides: the private names of peers lie below the packages that need one of them.
FLOORS = [
    {
        "arguments",
        "quantlayers_cli",
        "quantlayers_kernels",
        "evaluate",
        "old_names",
        "required_versions",
        "integrations.private_experts",
        "integrations.private_peft",
        "integrations.private_transformers",
    },
    {"formats", "storage"},
    {"methods"},
    {"layers"},
    {"calibration"},
    {"transforms"},
    {"bit_allocation"},
    {"merging"},
    {"lora", "scales"},
    {"model_merge"},
    {"integrations"},
    {"model", "saving", "training"},
    {"exports", "report", "streaming"},
    {"estimate"},
    {"cli"},
    {"peft_quantlayers", "__main__"},  # the package's own __init__: the public surface
]
MAY_IMPORT_PEFT = {
    "lora",
    "scales",
    "model_merge",
    "integrations",
    "integrations.private_peft",
    "training",
    "estimate",
    "cli",
}
KNOWS_NO_PEERS = {
    "quantlayers_cli",
    "quantlayers_kernels",
    "formats",
    "storage",
    "methods",
    "layers",
    "merging",
    "evaluate",
}
# By hand: folders with the same files, one for each method that has kernels, and one for what they share.
PARTS_OF_METHODS = {"hqq", "aqlm", "bitpack"}
PRIVATE_NAMES = "integrations"  # the only folder that may touch them


def module_name(file: Path) -> str:
    """Dotted name; a package's ``__init__`` keeps that as its last part, so that relative imports count right."""
    return ".".join(file.relative_to(KERNELS.parent if file.is_relative_to(KERNELS) else ROOT).with_suffix("").parts)


def package_of(dotted: str) -> str:
    """The floor's member that a dotted name belongs to."""
    parts = [part for part in dotted.split(".") if part != "__init__"]
    if parts[0] in ("quantlayers_cli", "quantlayers_kernels") or len(parts) == 1:
        return parts[0]
    longest = ".".join(parts[1:3])
    return longest if any(longest in packages for packages in FLOORS) else parts[1]


def floor(dotted: str) -> int:
    for level, packages in enumerate(FLOORS):
        if package_of(dotted) in packages:
            return level
    raise AssertionError(f"{dotted} lies on no floor: say in FLOORS where it belongs.")


def is_ours(dotted: str) -> bool:
    return dotted.split(".")[0] in ("peft_quantlayers", "quantlayers_cli", "quantlayers_kernels")


def imported_module(dotted: str, name: str | None) -> str:
    """``from . import layers`` takes a module out of a package: then the name says which."""
    if name is not None and is_ours(dotted):
        root = KERNELS.parent if dotted.startswith("quantlayers_kernels") else ROOT
        path = root.joinpath(*dotted.split("."), name)
        if path.is_dir() or path.with_suffix(".py").is_file():
            return f"{dotted}.{name}"
    return dotted


def upward_imports(source: str, module: str) -> list[str]:
    targets = {imported_module(dotted, name) for dotted, name in imports(source, module) if is_ours(dotted)}
    return sorted(target for target in targets if floor(target) > floor(module))


OWN_NAMES = {module_name(file): own_names(file.read_text()) for file in FILES}


def names_within_reach(module: str, source: str) -> set[str]:
    """Private names that a file may use: its own, and those of the files of its package that it imports from."""
    targets = {imported_module(dotted, name) for dotted, name in imports(source, module)}
    near = {target for target in targets & OWN_NAMES.keys() if package_of(target) == package_of(module)}
    return OWN_NAMES[module].union(*(OWN_NAMES[target] for target in near))


# What files outside integrations/ replace on objects that are not ``self``, and why.
MAY_REPLACE = {
    "peft_quantlayers.calibration.paused_pass": {
        "vars(module)['forward']": "a pass must go on with the module that is in that place by then",
        "vars(module).pop('forward', None)": "the module's own forward again",
    },
    "quantlayers_cli.by_module": {
        "sys.excepthook": "what an interrupt prints before there is any code of ours that could catch it",
    },
    "quantlayers_cli.autoload.sitecustomize": {
        "loader.exec_module": "of a module that is about to be imported, for one call",
    },
    "peft_quantlayers.layers.codes_parameter": {
        "wrapped.__dict__.update(parameter.__dict__)": "an object of ours, made in the line before",
    },
    "peft_quantlayers.lora.merge_aware_config": {
        "vars(aware).update(copy.copy(vars(config)))": "an object of ours, made in the line before",
    },
    "peft_quantlayers.old_names": {"module.__getattr__": "a module of ours, made two lines before"},
}


def import_graph() -> dict[str, set[str]]:
    """Of each file the files that it imports, those for types included; a package stands for its ``__init__``."""
    names = {module_name(file).removesuffix(".__init__") for file in FILES}
    graph = {}
    for file in FILES:
        module = module_name(file)
        targets = {imported_module(dotted, name) for dotted, name in imports(file.read_text(), module)}
        graph[module.removesuffix(".__init__")] = {target for target in targets if target in names}
    return graph


def id_of(file: Path) -> str:
    return module_name(file)


@pytest.mark.parametrize("file", FILES, ids=id_of)
def test_imports_go_down_only(file):
    assert upward_imports(file.read_text(), module_name(file)) == []


@pytest.mark.parametrize("file", [file for file in FILES if file.is_relative_to(KERNELS)], ids=id_of)
def test_the_kernels_import_torch_and_the_standard_library_only(file):
    roots = {dotted.split(".")[0] for dotted, _ in imports(file.read_text(), module_name(file))}
    assert roots <= {"torch", "triton", "quantlayers_kernels"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("file", FILES, ids=id_of)
def test_peft_is_imported_only_where_adapters_meet_it(file):
    module = module_name(file)
    roots = {dotted.split(".")[0] for dotted, _ in imports(file.read_text(), module)}
    assert "peft" not in roots or package_of(module) in MAY_IMPORT_PEFT


@pytest.mark.parametrize("file", FILES, ids=id_of)
def test_packages_that_know_no_peers_import_none(file):
    module = module_name(file)
    roots = {dotted.split(".")[0] for dotted, _ in imports(file.read_text(), module)}
    assert package_of(module) not in KNOWS_NO_PEERS or not roots & set(PEERS)


@pytest.mark.parametrize("file", sorted(COMMAND_LINE.rglob("*.py")), ids=id_of)
def test_the_start_of_the_command_line_imports_the_standard_library_and_yaml_only(file):
    roots = {dotted.split(".")[0] for dotted, _ in imports(file.read_text(), module_name(file))}
    assert roots <= {"quantlayers_cli", "yaml"} | set(sys.stdlib_module_names)


def test_no_two_files_have_one_name():
    """But those that are the same part of several methods, and verbs."""
    folders: dict[str, set[Path]] = {}
    for file in FILES:
        if file.name != "__init__.py" and file.parent.name not in {*PARTS_OF_METHODS, "verbs"}:
            folders.setdefault(file.name, set()).add(file.parent)
    assert {name: found for name, found in folders.items() if len(found) > 1} == {}


def test_no_files_import_each_other_in_a_circle():
    assert find_circle(import_graph()) == []


@pytest.mark.parametrize("file", FILES, ids=id_of)
def test_private_names_of_peers_are_used_in_integrations_only(file):
    module, source = module_name(file), file.read_text()
    if package_of(module).split(".")[0] != PRIVATE_NAMES:
        assert private_imports(source, module) == []
        assert private_attributes(source, names_within_reach(module, source)) == []


@pytest.mark.parametrize("file", FILES, ids=id_of)
def test_objects_of_others_are_changed_in_integrations_only(file):
    module = module_name(file)
    if package_of(module).split(".")[0] != PRIVATE_NAMES:
        assert set(replacements(file.read_text())) == set(MAY_REPLACE.get(module, ()))


def test_evaluate_imports_no_more_of_ours_than_the_checks_of_arguments():
    for file in (PACKAGE / "evaluate").rglob("*.py"):
        targets = [dotted for dotted, _ in imports(file.read_text(), module_name(file)) if is_ours(dotted)]
        assert all(package_of(target) in ("evaluate", "arguments") for target in targets), file


@pytest.mark.parametrize(
    ("module", "source", "upward"),
    [
        ("peft_quantlayers.formats.quant_spec", "from ..methods import hqq", ["peft_quantlayers.methods.hqq"]),
        ("peft_quantlayers.formats.quant_spec", "def f():\n    from .. import layers", ["peft_quantlayers.layers"]),
        ("peft_quantlayers.layers.__init__", "from .linear import HQQLinear", []),
        ("peft_quantlayers.layers.__init__", "from ..lora import x", ["peft_quantlayers.lora"]),
        ("peft_quantlayers.layers.linear", "import peft_quantlayers", ["peft_quantlayers"]),
        ("quantlayers_kernels.hqq.op", "import peft_quantlayers.formats", ["peft_quantlayers.formats"]),
        ("quantlayers_kernels.hqq.op", "from ..bitpack import unpack", []),
        ("peft_quantlayers.lora.layer", "from ..layers import HQQLinear", []),
    ],
)
def test_the_walk_sees_upward_imports(module, source, upward):
    assert upward_imports(source, module) == upward


@pytest.mark.parametrize("file", [file for file in FILES if package_of(module_name(file)) != PRIVATE_NAMES], ids=id_of)
def test_what_integrations_override_is_private_to_peers_everywhere_else(file):
    within_reach = names_within_reach(module_name(file), file.read_text())
    for attribute in (
        "_create_and_replace",
        "_create_new_module",
        "_prepare_model",
        "_process_model_before_weight_loading",
        "_process_model_after_weight_loading",
        "_dequantize",
        "_prepare_adapter_config",
    ):
        assert any(attribute in names for module, names in OWN_NAMES.items() if package_of(module) == PRIVATE_NAMES)
        assert private_attributes(f"model.{attribute}(x)", within_reach) == [attribute]


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        (
            "quantlayers_kernels.hqq, quantlayers_kernels.bitpack",
            ["triton", "transformers", "peft", "peft_quantlayers"],
        ),
        ("peft_quantlayers", []),
    ],
)
def test_an_import_loads_no_kernel_compiler_and_touches_no_gpu(package, absent):
    # Other packages load Triton where it is installed; what counts is that ours do not, and run without it.
    program = f"""
import sys
if {not absent}:
    import peft, transformers.pytorch_utils, transformers.quantizers.auto
    before = "triton" in sys.modules
else:
    before = False
import {package}
import torch
assert not torch.cuda.is_initialized()
assert ("triton" in sys.modules) == before, "Triton was loaded"
loaded = [name for name in {absent!r} if name in sys.modules]
assert not loaded, loaded
"""
    if absent:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    else:  # the others are loaded before ours in either case
        done = run_program("-c", program, timeout=120)
    assert done.returncode == 0, done.stderr
