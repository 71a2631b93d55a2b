"""The command line: verbs that parse arguments, and call public functions of the package.

``quantlayers_cli`` finds the verb, and comes here when there is work to do.
"""

from quantlayers_cli import main

__all__ = ["main"]
