"""The first step of the command line: what needs no torch, so that help and wrong usage are there at once.

``main`` starts every verb. Which options there are is read from ``options.json``, which ``benchmarks/cli_page.py``
writes from their declarations in ``peft_quantlayers.cli``. Imports the standard library and yaml only:
``peft_quantlayers``, whose import takes seconds, is imported when there is work for it.
"""

from .main import main

__all__ = ["main"]
