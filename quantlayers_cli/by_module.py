"""``python -m peft_quantlayers`` while it imports the package, which takes seconds: Ctrl-C is one line, no word else.

No code of the command line runs before that; ``peft_quantlayers`` imports this file first, and importing it is enough.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType

from .quiet import leave_out_what_others_say

PACKAGE, PROGRAM = "peft_quantlayers", "peft-quantlayers"


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"


def say_interrupts_in_one_line() -> None:
    """From now on a Ctrl-C that nothing catches prints one line instead of a traceback."""
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            shown(kind, error, trace)
        elif is_first_process():
            print(f"{PROGRAM}: interrupted. Nothing was begun.", file=sys.stderr)

    sys.excepthook = hook


# While Python looks for the module that it is to run, the name of the program is "-m".
if sys.argv[:1] == ["-m"] and PACKAGE in sys.orig_argv:
    say_interrupts_in_one_line()
    if "--debug" not in sys.orig_argv:
        leave_out_what_others_say()
