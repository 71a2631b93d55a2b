"""Imports go down only, private names of peers are used where we said, and an import starts nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, KERNELS = ROOT / "peft_quantlayers", ROOT / "kernels" / "quantlayers_kernels"
FILES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])

# Low to high. A module may import its own floor and those below; ``evaluate`` needs none of ours, and all may use it.
FLOORS = [
    {"quantlayers_kernels", "evaluate"},
    {"formats"},
    {"methods"},
    {"layers"},
    {"calibration"},
    {"merging"},
    {"lora", "scales"},
    {"model_merge"},
    {"integrations"},
    {"model", "training"},
    {"export", "report"},
    {"cli"},
    {"peft_quantlayers"},  # the package's own __init__: the public surface
]
MAY_IMPORT_PEFT = {"lora", "scales", "model_merge", "integrations", "training"}
MAY_USE_PRIVATE_NAMES = {"integrations"}
PEERS = ("peft", "transformers")


def module_name(file: Path) -> str:
    """Dotted name; a package's ``__init__`` keeps that as its last part, so that relative imports count right."""
    return ".".join(file.relative_to(KERNELS.parent if file.is_relative_to(KERNELS) else ROOT).with_suffix("").parts)


def room(dotted: str) -> str:
    """The floor's member that a dotted name belongs to."""
    parts = [part for part in dotted.split(".") if part != "__init__"]
    if parts[0] == "quantlayers_kernels" or len(parts) == 1:
        return parts[0]
    return parts[1]


def floor(dotted: str) -> int:
    for level, rooms in enumerate(FLOORS):
        if room(dotted) in rooms:
            return level
    raise AssertionError(f"{dotted} lies on no floor: say in FLOORS where it belongs.")


def imports(source: str, module: str) -> list[tuple[str, str | None]]:
    """(dotted module, name taken from it or None) of every import, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            found += [(".".join(filter(None, [base, node.module])), alias.name) for alias in node.names]
    return found


def is_ours(dotted: str) -> bool:
    return dotted.split(".")[0] in ("peft_quantlayers", "quantlayers_kernels")


def imported_rooms(dotted: str, name: str | None) -> str:
    """``from . import layers`` takes a room out of the package: then the name says which."""
    if dotted == "peft_quantlayers" and name is not None:
        in_package = (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()
        return f"peft_quantlayers.{name}" if in_package else dotted
    return dotted


def upward_imports(source: str, module: str) -> list[str]:
    targets = {imported_rooms(dotted, name) for dotted, name in imports(source, module) if is_ours(dotted)}
    return sorted(target for target in targets if floor(target) > floor(module))


def private_names(source: str, module: str) -> list[str]:
    """Underscored modules and names of the peers that a file imports."""
    return sorted(
        f"{dotted}:{name}"
        for dotted, name in imports(source, module)
        if dotted.split(".")[0] in PEERS
        and any(part.startswith("_") and not part.startswith("__") for part in [*dotted.split("."), name or ""])
    )


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
    assert "peft" not in roots or room(module) in MAY_IMPORT_PEFT


@pytest.mark.parametrize("file", FILES, ids=id_of)
def test_private_names_of_peers_are_imported_in_integrations_only(file):
    module = module_name(file)
    assert room(module) in MAY_USE_PRIVATE_NAMES or private_names(file.read_text(), module) == []


def test_evaluate_imports_none_of_ours():
    for file in (PACKAGE / "evaluate").rglob("*.py"):
        targets = [dotted for dotted, _ in imports(file.read_text(), module_name(file)) if is_ours(dotted)]
        assert all(room(target) == "evaluate" for target in targets), file


@pytest.mark.parametrize(
    ("module", "source", "upward"),
    [
        ("peft_quantlayers.formats.spec", "from ..methods import hqq", ["peft_quantlayers.methods"]),
        ("peft_quantlayers.formats.spec", "def f():\n    from .. import layers", ["peft_quantlayers.layers"]),
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


def test_the_walk_sees_private_names():
    source = "from peft.tuners._buffer_dict import BufferDict\nfrom transformers import _LazyModule, __version__"
    assert private_names(source, "peft_quantlayers.layers.linear") == [
        "peft.tuners._buffer_dict:BufferDict",
        "transformers:_LazyModule",
    ]


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
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
