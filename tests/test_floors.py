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
# The longest name that fits decides: the private names of peers lie below the rooms that need one of them.
FLOORS = [
    {"quantlayers_kernels", "evaluate", "integrations.private_peft", "integrations.private_transformers"},
    {"formats", "storage"},
    {"methods"},
    {"layers"},
    {"calibration"},
    {"merging"},
    {"lora", "scales"},
    {"model_merge"},
    {"integrations"},
    {"model", "saving", "training"},
    {"export", "report"},
    {"cli"},
    {"peft_quantlayers"},  # the package's own __init__: the public surface
]
MAY_IMPORT_PEFT = {"lora", "scales", "model_merge", "integrations", "integrations.private_peft", "training"}
KNOWS_NO_PEERS = {"quantlayers_kernels", "formats", "storage", "methods", "merging", "evaluate"}
PRIVATE_NAMES = "integrations"  # the only folder that may touch them
PEERS = ("peft", "transformers")


def module_name(file: Path) -> str:
    """Dotted name; a package's ``__init__`` keeps that as its last part, so that relative imports count right."""
    return ".".join(file.relative_to(KERNELS.parent if file.is_relative_to(KERNELS) else ROOT).with_suffix("").parts)


def room(dotted: str) -> str:
    """The floor's member that a dotted name belongs to."""
    parts = [part for part in dotted.split(".") if part != "__init__"]
    if parts[0] == "quantlayers_kernels" or len(parts) == 1:
        return parts[0]
    longest = ".".join(parts[1:3])
    return longest if any(longest in rooms for rooms in FLOORS) else parts[1]


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


def imported_module(dotted: str, name: str | None) -> str:
    """``from . import layers`` takes a module out of a package: then the name says which."""
    if name is not None and is_ours(dotted):
        root = ROOT if dotted.startswith("peft_quantlayers") else KERNELS.parent
        path = root.joinpath(*dotted.split("."), name)
        if path.is_dir() or path.with_suffix(".py").is_file():
            return f"{dotted}.{name}"
    return dotted


def upward_imports(source: str, module: str) -> list[str]:
    targets = {imported_module(dotted, name) for dotted, name in imports(source, module) if is_ours(dotted)}
    return sorted(target for target in targets if floor(target) > floor(module))


def private_imports(source: str, module: str) -> list[str]:
    """Underscored modules and names of the peers that a file imports."""
    return sorted(
        f"{dotted}:{name}"
        for dotted, name in imports(source, module)
        if dotted.split(".")[0] in PEERS
        and any(part.startswith("_") and not part.startswith("__") for part in [*dotted.split("."), name or ""])
    )


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


# Private attributes of torch and of Python that we use, for what they have no public name.
NOT_OF_PEERS = {
    "_C", "_apply", "_asdict", "_backward_hooks", "_backward_pre_hooks", "_current_level", "_fields", "_forward_hooks",
    "_forward_pre_hooks", "_functorch", "_get_tracing_state", "_len_torch_dispatch_stack", "_load_from_state_dict",
    "_make_subclass", "_make_wrapper_subclass", "_modules", "_parameters", "_schema", "_version",
}  # fmt: skip


ATTRIBUTE_CALLS = ("getattr", "setattr", "hasattr", "delattr")


def own_names(source: str) -> set[str]:
    """Private names that a file defines: functions, classes, fields, and attributes that it sets on ``self``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in (part for each in targets for part in ast.walk(each)):
                if isinstance(target, ast.Name):
                    found.add(target.id)
                elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    found |= {target.attr} if target.value.id in ("self", "cls", "ctx") else set()
    return {name for name in found if is_private(name)}


OWN_NAMES = set().union(*(own_names(file.read_text()) for file in FILES))


def private_attributes(source: str, own: set[str]) -> list[str]:
    """Private attributes that are neither ours nor torch's, also where they are named by a string."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "setattr",
            "hasattr",
            "delattr",
        ):
            found |= {arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant) and is_private(arg.value)}
    return sorted(found - own - NOT_OF_PEERS)


def replacements(source: str) -> list[str]:
    """Where a file changes what an object of somebody else is or does: its class, a method, its ``__dict__``."""
    functions = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    found = []
    for node in ast.walk(ast.parse(source)):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Attribute):
                is_self = getattr(target.value, "id", "") in ("self", "cls", "ctx")
                is_function = isinstance(node.value, ast.Lambda) or getattr(node.value, "id", None) in functions
                if target.attr == "__class__" or (is_function and not is_self):
                    found.append(ast.unparse(target))
            elif isinstance(target, ast.Subscript):
                holder = target.value
                is_dict = getattr(holder, "attr", "") == "__dict__"
                if is_dict or (isinstance(holder, ast.Call) and getattr(holder.func, "id", "") == "vars"):
                    found.append(ast.unparse(target))
    return found


# Files outside integrations/ that do, and why.
MAY_REPLACE = {
    "peft_quantlayers.calibration.paused_pass": "a pass must go on with the module that stands there by then",
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


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of imports; empty where there is none. A package's own files do not count as importing it."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph[node]):
            circle = visit(target, [*path, node])
            if circle:
                return circle
        done.add(node)
        return []

    for start in sorted(graph):
        circle = visit(start, [])
        if circle:
            return circle
    return []


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
def test_rooms_that_know_no_peers_import_none(file):
    module = module_name(file)
    roots = {dotted.split(".")[0] for dotted, _ in imports(file.read_text(), module)}
    assert room(module) not in KNOWS_NO_PEERS or not roots & set(PEERS)


def test_no_files_import_each_other_in_a_circle():
    assert find_circle(import_graph()) == []


@pytest.mark.parametrize("file", FILES, ids=id_of)
def test_private_names_of_peers_are_used_in_integrations_only(file):
    module, source = module_name(file), file.read_text()
    if room(module).split(".")[0] != PRIVATE_NAMES:
        assert private_imports(source, module) == []
        assert private_attributes(source, OWN_NAMES) == []


@pytest.mark.parametrize("file", FILES, ids=id_of)
def test_objects_of_others_are_changed_in_integrations_only(file):
    module = module_name(file)
    if room(module).split(".")[0] != PRIVATE_NAMES and module not in MAY_REPLACE:
        assert replacements(file.read_text()) == []


def test_evaluate_imports_none_of_ours():
    for file in (PACKAGE / "evaluate").rglob("*.py"):
        targets = [dotted for dotted, _ in imports(file.read_text(), module_name(file)) if is_ours(dotted)]
        assert all(room(target) == "evaluate" for target in targets), file


@pytest.mark.parametrize(
    ("module", "source", "upward"),
    [
        ("peft_quantlayers.formats.spec", "from ..methods import hqq", ["peft_quantlayers.methods.hqq"]),
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
    assert private_imports(source, "peft_quantlayers.layers.linear") == [
        "peft.tuners._buffer_dict:BufferDict",
        "transformers:_LazyModule",
    ]
    source = (
        "class A:\n    def _own(self):\n        self._mine = layer._caches\n        return getattr(model, '_tp_plan')"
    )
    assert private_attributes(source, own_names(source)) == ["_caches", "_tp_plan"]


def test_the_walk_sees_replaced_classes_and_methods():
    source = (
        "aware.__class__ = Other\nself.hook = lambda: None\nlayer.merge = lambda *args: None\n"
        "vars(module)['forward'] = run\ndef run(): pass\nlayer.run = run\nlayer.size = 3\n"
    )
    assert replacements(source) == ["aware.__class__", "layer.merge", "vars(module)['forward']", "layer.run"]


def test_the_walk_sees_circles():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


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
