"""Python imports this file at its start if its folder is in ``PYTHONPATH``; ``peft-quantlayers run`` puts it there.

It imports peft_quantlayers as soon as the process has imported transformers, and costs nothing in any other process.
While a module that peft_quantlayers itself imports may be only half imported, it waits until that is done. A
``sitecustomize`` further down the path, which this one hides, is run too. Imports the standard library only.
"""

import importlib
import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import Any

PACKAGE, TRIGGER = "peft_quantlayers", "transformers"
# What peft_quantlayers imports and what may itself import transformers; of the last three also what is inside them:
# a module of transformers may import peft, lazily and long after ``import transformers``.
WAITED_FOR = ("torch", "safetensors", TRIGGER, "peft", "accelerate")
WITH_MODULES = (f"{TRIGGER}.", "peft.", "accelerate.")


class AfterTransformers(MetaPathFinder):
    """Finds nothing itself: wraps what executes the modules of ``WAITED_FOR``."""

    def __init__(self):
        self.searched, self.executed = set(), []

    def find_spec(self, name, path=None, target=None):
        is_waited_for = name in WAITED_FOR or name.startswith(WITH_MODULES)
        if not is_waited_for or name in self.searched:
            return None
        self.searched.add(name)  # the other finders are asked, and this one again
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searched.remove(name)  # who asks need not import it
        loader: Any = spec and spec.loader
        own = getattr(loader, "exec_module", None)
        if own is None:
            return spec

        def exec_module(module):
            del loader.exec_module  # the loader's own again
            self.executed.append(name)
            try:
                own(module)
            finally:
                self.executed.remove(name)
            self.import_package()

        loader.exec_module = exec_module
        return spec

    def import_package(self):
        """Import the package, unless something that it needs is being imported at the moment."""
        if self.executed or TRIGGER not in sys.modules or PACKAGE in sys.modules:
            return
        sys.meta_path.remove(self)
        try:
            importlib.import_module(PACKAGE)
        except Exception as error:  # the program may not need it
            print(f"{PACKAGE} could not be imported, so quantized models will not load: {error!r}", file=sys.stderr)


def run_hidden():
    """Run the ``sitecustomize`` that this one hides."""
    here = os.path.dirname(os.path.abspath(__file__))
    spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if os.path.abspath(path) != here])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, AfterTransformers())
run_hidden()
