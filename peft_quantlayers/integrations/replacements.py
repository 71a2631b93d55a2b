"""Attributes of other packages that ours stand in for, until they are put back. Imports nothing."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

_INHERITED = object()


class Replacements:
    """What was replaced; empty, and False, while nothing is."""

    def __init__(self) -> None:
        # By owner and name: what callers found there, and the owner's own entry, _INHERITED if it had none.
        self._originals: dict[tuple[Any, str], tuple[Any, Any]] = {}

    def __bool__(self) -> bool:
        return bool(self._originals)

    def replace(self, owner: Any, name: str, ours: Any) -> None:
        """Put ``ours`` in the place of ``owner.name``."""
        self._originals[owner, name] = (getattr(owner, name), vars(owner).get(name, _INHERITED))
        setattr(owner, name, ours)

    def wrap(self, owner: Any, name: str, ours: Callable[..., Any]) -> None:
        """Call ``ours`` in the place of a method: with that, bound, and the object, unless it is a class method."""
        method = inspect.getattr_static(owner, name)
        wrapper: Any
        if isinstance(method, classmethod):

            @functools.wraps(method.__func__)
            def wrapper(cls: Any, *args: Any, **kwargs: Any) -> Any:
                return ours(method.__get__(None, cls), *args, **kwargs)

            wrapper = classmethod(wrapper)
        else:

            @functools.wraps(method)
            def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
                return ours(method.__get__(self), self, *args, **kwargs)

        self.replace(owner, name, wrapper)

    def original(self, owner: Any, name: str) -> Any:
        """What ``owner.name`` was."""
        return self._originals[owner, name][0]

    def names(self) -> set[str]:
        """The names of all that is replaced, with that of their class, or of their module where they are functions."""
        return {f"{owner.__name__}.{name}" for owner, name in self._originals}

    def restore(self) -> None:
        """Put everything back."""
        for (owner, name), (_, own) in self._originals.items():
            if own is _INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, own)
        self._originals.clear()
