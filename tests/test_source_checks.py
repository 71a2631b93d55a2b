"""The checks of source see what they are for, in each way that it can be written."""

import re
from pathlib import Path

import pytest
from source_checks import find_circle, own_names, private_attributes, private_imports, replacements


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


ROOT = Path(__file__).parents[1]
# Words in whose place the field has a term, or a sentence a subject.
NOT_OURS = re.compile(r"\b(anew|anybody|errs|nobody|somebody)\b", re.IGNORECASE)


def test_prose_has_no_words_that_the_field_does_not_use():
    folders = ("peft_quantlayers", "kernels", "quantlayers_cli", "benchmarks", "examples", "docs")
    files = [file for folder in folders for kind in ("*.py", "*.md") for file in (ROOT / folder).rglob(kind)]
    found = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in [*files, *ROOT.glob("*.md")]
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if NOT_OURS.search(line)
    ]
    assert found == []
