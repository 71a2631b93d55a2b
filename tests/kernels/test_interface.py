"""The table that Python calls the C functions by says what the C sources declare."""

import ctypes
import importlib.util
import re
from ctypes import POINTER, Structure, c_float, c_int, c_int64, c_uint32, c_void_p
from pathlib import Path

import pytest
import torch

from quantlayers_kernels import interface, native

CSRC = Path(interface.__file__).parent / "csrc"
if not CSRC.is_dir():
    pytest.skip("the C sources are not in this installation", allow_module_level=True)

SCALARS = {"int": c_int, "int64_t": c_int64, "float": c_float, "uint32_t": c_uint32}
STRUCTURES = {each for group in interface.KERNELS.values() for each in group}


def source(name: str) -> str:
    """A C source without its comments."""
    return re.sub(r"/\*.*?\*/", "", (CSRC / name).read_text(), flags=re.DOTALL)


def c_name(structure: type[Structure]) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", structure.__name__).lower()


def declared(declaration: str) -> list[tuple[str, type]]:
    """Names and types of what one C declaration declares: ``const float *x, *y`` is two pointers."""
    base, names = re.fullmatch(r"\s*((?:const\s+)?(?:struct\s+)?\w+)\s*(.*?)\s*", declaration, re.DOTALL).groups()
    of_struct = {f"struct {c_name(each)}": each for each in STRUCTURES}.get(base.removeprefix("const "))
    found = []
    for name in names.split(","):
        is_pointer = name.strip().startswith("*")
        pointer = c_void_p if of_struct is None else POINTER(of_struct)
        found.append((name.strip(" *\n"), pointer if is_pointer else SCALARS[base]))
    return found


@pytest.mark.parametrize("structure", sorted(STRUCTURES, key=c_name), ids=c_name)
def test_a_structure_has_the_fields_of_its_c_struct(structure):
    body = re.search(rf"struct {c_name(structure)} \{{(.*?)\}};", source("quantlayers.h"), re.DOTALL).group(1)
    fields = [field for line in body.split(";") if line.strip() for field in declared(line)]
    assert [tuple(field) for field in structure._fields_] == fields


def test_the_functions_are_those_that_the_library_exports():
    text = "".join(source(path.name) for path in CSRC.glob("*.c"))
    exported = {}
    for result, name, arguments in re.findall(r"^(\w+) (ql_\w+)\((.*?)\) \{", text, re.DOTALL | re.MULTILINE):
        parameters = [] if arguments == "void" else arguments.split(",")
        types = tuple(kind for parameter in parameters for _, kind in declared(parameter))
        exported[name] = (None if result == "void" else SCALARS[result], types)
    assert exported == interface.FUNCTIONS


def test_every_kernel_of_the_table_is_a_function_of_the_loaded_library():
    if not native.is_available():
        pytest.skip("the compiled kernels were not built")
    for name, (result, arguments) in interface.FUNCTIONS.items():
        function = getattr(native.library(), name)
        assert (function.restype, tuple(function.argtypes)) == (result, arguments)


def with_table(change: str, by: str) -> int:
    """The interface's number when its file says something else."""
    text = Path(interface.__file__).read_text()
    assert change in text
    spec = importlib.util.spec_from_loader("changed_interface", loader=None)
    module = importlib.util.module_from_spec(spec)
    exec(compile(text.replace(change, by), "changed_interface", "exec"), module.__dict__)
    return module.INTERFACE


@pytest.mark.parametrize(
    ("change", "by"),
    [
        ('("nbits", c_int),\n        ("axis", c_int)', '("axis", c_int),\n        ("nbits", c_int)'),
        ('("margin", c_float)', '("margin", c_int)'),
        ('"ql_hqq_choose": (HQQChoice,)', '"ql_hqq_choose": (HQQChoice, Product)'),
        ('("n_rows", c_int64),\n        ("kind"', '("kind"'),
        ("c_int, c_int))", "c_int))"),
    ],
)
def test_the_number_changes_with_the_table(change, by):
    assert with_table(change, by) != interface.INTERFACE


def test_the_number_does_not_change_with_a_comment():
    assert with_table("# Result and arguments", "# Results, then arguments") == interface.INTERFACE


def test_a_call_with_another_structure_is_refused():
    if not native.is_available():
        pytest.skip("the compiled kernels were not built")
    with pytest.raises(ctypes.ArgumentError):
        native.call("ql_hqq_linear", interface.Product(), interface.HQQWeight())
    with pytest.raises(TypeError):
        interface.HQQGroups(values=torch.zeros(1).data_ptr(), max_code="three")
