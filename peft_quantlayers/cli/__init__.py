"""The command line: verbs that parse arguments, and call public functions of the package."""

from .main import main

__all__ = ["main"]
