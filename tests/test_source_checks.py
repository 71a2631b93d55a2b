"""The checks of source see what they are for, in each way that it can be written."""

import re
from pathlib import Path

import pytest
from source_checks import (
    find_circle,
    lists_of_methods,
    own_names,
    private_attributes,
    private_imports,
    replacements,
)

from peft_quantlayers.methods import config_type, registered_methods


def test_the_walk_sees_private_imports():
    source = "from peft.tuners._buffer_dict import BufferDict\nfrom transformers import _LazyModule, __version__"
    assert private_imports(source, "peft_quantlayers.layers.linear") == [
        "peft.tuners._buffer_dict:BufferDict",
        "transformers:_LazyModule",
    ]


OWN = "class A:\n    def _own(self):\n        self._mine: int = self._own()\n"


@pytest.mark.parametrize(
    ("source", "private"),
    [
        (OWN, []),
        (OWN + "layer._caches = layer._mine", ["_caches"]),
        (OWN + "getattr(model, '_tp_plan')", ["_tp_plan"]),
        (OWN + "hasattr(model, '_tp_plan')", ["_tp_plan"]),
        (OWN + "builtins.setattr(model, '_tp_plan', 1)", ["_tp_plan"]),
        (OWN + "vars(model)['_tp_plan'], layer.__dict__['_caches']", ["_caches", "_tp_plan"]),
        (OWN + "vars(model)[name], tensors['_other']", []),
        (OWN + "NAME = '_caches'\ngetattr(layer, NAME)", ["_caches"]),
        (OWN + "operator.attrgetter('model._tp_plan')(x), layer.__getattribute__('_caches')", ["_caches", "_tp_plan"]),
        (OWN + "getattr(layer, name), getattr(layer, '_own')", []),
    ],
)
def test_the_walk_sees_private_attributes(source, private):
    assert private_attributes(source, own_names(source)) == private


@pytest.mark.parametrize(
    "source",
    [
        "aware.__class__ = Other",
        "aware.__class__: type = Other",
        "self.__class__ = Other",
        "setattr(layer, '__class__', Other)",
        "object.__setattr__(layer, '__class__', Other)",
        "layer.merge = lambda *args: None",
        "layer.forward = make()",
        "layer.forward: Callable = run",
        "layer.forward = types.MethodType(run, layer)",
        "layer.forward, layer.size = run, 3",
        "self.layer.unmerge = run",
        "layer.step = types.MethodType(run, layer)",
        "layer.step = functools.partial(run, layer)",
        "layer.step = run.__get__(layer)",
        "def run(): pass\nlayer.step = run",
        "del layer.forward",
        "delattr(layer, 'forward')",
        "setattr(layer, 'forward', run)",
        "setattr(layer, name, lambda: None)",
        "layer.__dict__.update(forward=run)",
        "layer.__dict__.setdefault('forward', run)",
        "layer.__dict__['forward'] = run",
        "layer.__dict__ = state",
        "layer.__dict__ |= state",
        "vars(module)['forward'] = run",
        "vars(module).update(forward=run)",
        "vars(module).pop('forward')",
        "del vars(module)['forward']",
        "setattr(vars(module), 'forward', run)",
        "import peft\nsetattr(peft.LoraModel, 'step', imported)",
        "from peft import LoraModel\nLoraModel.step = imported",
        "import transformers as t\nt.utils.logging.level = 3",
    ],
)
def test_the_walk_sees_replaced_classes_and_methods(source):
    assert len(replacements(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "self.hook = lambda: None",
        "self.forward = run",
        "self.__dict__.update(state)",
        "vars(self).update(state)",
        "layer.size = 3",
        "object.__setattr__(self, 'dtype', dtype)",
        "setattr(layer, name, tensor)",
        "found.update(forward=run)",
        "forward = vars(module)['forward']",
        "copy.__setstate__(state)",
    ],
)
def test_the_walk_allows_writes_that_replace_nothing(source):
    assert replacements(source) == []


def test_the_walk_sees_circles():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


METHOD_NAMES = {
    name: method
    for method, found in registered_methods().items()
    for name in (method, found.spec_type.__name__, config_type(found.spec_type).__name__)
}


@pytest.mark.parametrize(
    "source",
    [
        "@parametrize('method', ['hqq', 'nf4'])\ndef test(method): ...",
        "for method in ('hqq', 'aqlm', 'other'): ...",
        "CONFIGS = {'hqq': a, 'aqlm': b}",
        "CONFIGS = {\n    'quick': pql.HQQConfig(nbits=4),\n    'small': NF4Config(),\n}",
        "SPECS = [HQQSpec(), AQLMSpec(rounds=1)]",
        "CASES = [('hqq', 'scale'), ('aqlm', 'codebooks')]",
        "for config in (HQQConfig, NF4Config): ...",
        "# A comment that gives no reason.\nmethods = ['hqq', 'nf4']",
    ],
)
def test_the_walk_sees_lists_of_methods(source):
    assert len(lists_of_methods(source, METHOD_NAMES)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "CONFIGS = {name: quick_config(name) for name in METHODS} | {'hqq': a, 'aqlm': b}",
        "CASES = [*map(quick_config, METHODS), HQQConfig(nbits=3), AQLMConfig()]",
        "assert found == ['hqq', 'aqlm']",
        "parametrize('config', CONFIGS, ids=['hqq', 'nf4'])",
        "SPECS = [HQQSpec(nbits=4), HQQSpec(nbits=3)]",
        "PUBLIC = ['AQLMConfig', 'HQQConfig', 'a', 'b', 'c']",
        "# By hand: the two that have a kernel.\nmethods = ['hqq', 'aqlm']",
        "methods = {'hqq': ('hqq', 'nf4'), 'nf4': b}  # By hand: a reason.",
    ],
)
def test_the_walk_allows_what_adds_to_the_registry_and_lists_with_a_reason(source):
    assert lists_of_methods(source, METHOD_NAMES) == []


ROOT = Path(__file__).parents[1]


def test_tests_take_methods_from_the_registry_or_say_why_not():
    """``every_method.py`` has them; a test of a list by hand would not run on the next method."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in files
        for line in lists_of_methods(file.read_text(encoding="utf-8"), METHOD_NAMES)
    ]
    assert found == [], "use METHODS or quick_config of every_method.py, or say why not: # By hand: ..."


# Words in whose place the field has a term, or a sentence a subject.
NOT_OURS = re.compile(r"\b(anew|anybody|errs|nobody|somebody)\b", re.IGNORECASE)


def test_prose_has_no_words_that_the_field_does_not_use():
    folders = ("peft_quantlayers", "kernels", "quantlayers_cli", "benchmarks", "examples", "docs", "patches")
    files = [file for folder in folders for kind in ("*.py", "*.md") for file in (ROOT / folder).rglob(kind)]
    found = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in [*files, *ROOT.glob("*.md")]
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if NOT_OURS.search(line)
    ]
    assert found == []
