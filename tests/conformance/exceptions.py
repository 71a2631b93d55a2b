"""The tests of PEFT that cannot pass on a quantized layer, each with its reason and the error that it must give."""

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from .linears import SPECS

FILE = Path(__file__).with_name("exceptions.toml")


@dataclass
class ExpectedFailure:
    """One entry of the list.

    Fields:
        tests: pattern of test ids; ``*`` stands for anything, all other characters for themselves.
        error: regular expression that the failure's text must match.
        reason: why the method cannot apply.
        methods: replacements that it concerns; ``dense`` is plain ``nn.Linear``. Empty for every quantization method.
        failed, passed: ids that met it in this run.
    """

    tests: str
    error: str
    reason: str
    methods: tuple[str, ...] = ()
    failed: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)

    def concerns(self, test: str) -> bool:
        return re.fullmatch(re.escape(self.tests).replace(r"\*", ".*"), test, re.S) is not None


def read_exceptions(method: str, file: Path = FILE) -> list[ExpectedFailure]:
    """The entries that concern ``method``."""
    entries = tomllib.loads(file.read_text()).get("exception", [])
    listed = [ExpectedFailure(**{**entry, "methods": tuple(entry.get("methods", ()))}) for entry in entries]
    return [entry for entry in listed if method in (entry.methods or SPECS)]
