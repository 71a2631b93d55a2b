"""The registry of quantization methods: those of this folder, and those of installed packages."""

import importlib
import logging
import pkgutil
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..formats import QuantSpec
from .base import QuantMethod

logger = logging.getLogger(__name__)

# An entry point of this group names a class without arguments, a QuantMethod.
ENTRY_POINT_GROUP = "peft_quantlayers.methods"

_methods: dict[str, QuantMethod] = {}
_pending: list[EntryPoint] | None = None  # not loaded yet; None before they were looked for


def register_method(method: QuantMethod) -> None:
    """Make ``method`` known under its spec's name.

    Raises:
        TypeError: no method, or the class of one.
        ValueError: another method has that name already.
    """
    if isinstance(method, type):
        name = method.__name__
        raise TypeError(f"register_method takes a method, and {name} is the class of one: write {name}().")
    if not isinstance(method, QuantMethod):
        raise TypeError(f"register_method takes a QuantMethod, got {type(method).__name__}.")
    name = method.spec_type.method
    if name in _methods and type(_methods[name]) is not type(method):
        raise ValueError(f"a quantization method named {name!r} is registered already: {_methods[name]!r}.")
    _methods[name] = method


def import_methods(folder: Iterable[str], package: str) -> None:
    """Import every module and package of ``folder``, so that the methods in them register themselves."""
    for module in pkgutil.iter_modules(folder):
        importlib.import_module(f"{package}.{module.name}")


def registered_methods() -> dict[str, QuantMethod]:
    """All methods by name, those of installed packages (entry points) included.

    An entry point whose method cannot be loaded or registered is named in a warning and left out.
    """
    global _pending
    if _pending is None:
        _pending = list(entry_points(group=ENTRY_POINT_GROUP))
    while _pending:
        # Taken off first: a package may ask for the methods while it is loaded.
        entry_point = _pending.pop(0)
        try:
            register_method(entry_point.load()())
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            logger.warning("method %r (%s) was not loaded: %s", entry_point.name, entry_point.value, error)
    return dict(_methods)


def get_method(name: str) -> QuantMethod:
    """The method registered as ``name``.

    Raises:
        ValueError: nothing is registered under that name.
    """
    method = _methods.get(name)
    if method is None:
        method = registered_methods().get(name)
    if method is None:
        raise ValueError(f"unknown quantization method {name!r}; known are {sorted(_methods)}.")
    return method


def spec_from_dict(fields: Any) -> QuantSpec:
    """The spec of the method that ``fields["method"]`` names. Raises ValueError or TypeError on anything else."""
    if not isinstance(fields, dict) or not isinstance(fields.get("method"), str):
        raise TypeError(f"a spec must be a mapping with a 'method' name, got {fields!r}.")
    return get_method(fields["method"]).spec_type.from_dict(fields)
