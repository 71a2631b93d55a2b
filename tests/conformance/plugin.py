"""The pytest plugin under which PEFT's tests run: it replaces their linears and judges their outcomes.

Loaded with ``-p conformance.plugin``. A failure on the list of exceptions, with the error that the list names,
is an expected one; every other failure stays a failure, and so is an entry of the list whose tests all pass.
"""

import contextlib
import gc
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from .exceptions import FILE, ExpectedFailure, read_exceptions
from .linears import COMPARES_MEMORY, SPECS, Replacement

LOCAL = {None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", socket.gethostname()}
NEEDS_HUB = "needs the model hub"
NOT_IN_THE_HUBS_CACHE = "couldn't connect to 'https://huggingface.co'"
# Its tests quantize their models themselves.
QUANTIZES_ITSELF = "test_quantization_on_ours.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--method", choices=[*SPECS, "dense"], default="hqq", help="what takes the place of nn.Linear")
    parser.addoption("--exceptions", type=Path, default=FILE, help="the list of expected failures")
    parser.addoption("--summary", type=Path, default=None, help="JSON file to add the counts to")
    parser.addoption("--shard", default="0/1", help="I/N: every Nth test, from the Ith on")


def pytest_configure(config: pytest.Config) -> None:
    for marker in ("single_gpu_tests", "multi_gpu_tests", "regression"):
        config.addinivalue_line("markers", f"{marker}: PEFT's")
    config.pluginmanager.register(Judge(config), "conformance-judge")


class Judge:
    """Runs each test with linears replaced, and keeps the books."""

    def __init__(self, config: pytest.Config) -> None:
        self.method: str = config.getoption("--method")
        os.environ["CONFORMANCE_METHOD"] = self.method  # for quantization_on_ours.py
        self.exceptions = read_exceptions(self.method, config.getoption("--exceptions"))
        self.counts = dict.fromkeys(
            ("passed", "passed_on_quantized", "expected_failures", "failed", "skipped", "skipped_for_the_hub"), 0
        )
        self.unexpected: list[str] = []
        self._is_whole = config.getoption("--shard") == "0/1" and not config.getoption("keyword")
        self._index, self._of = (int(part) for part in config.getoption("--shard").split("/"))

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left_out = [item for number, item in enumerate(items) if number % self._of != self._index]
        items[:] = [item for number, item in enumerate(items) if number % self._of == self._index]
        config.hook.pytest_deselected(items=left_out)

    def pytest_collection_finish(self) -> None:
        """PEFT's tests collect garbage after each of them, which would look at all collected tests every time."""
        gc.collect()
        gc.freeze()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        replacement = Replacement(self.method) if self.method != "dense" else None
        item.stash[_REPLACEMENT] = replacement
        with _no_network(), replacement or contextlib.nullcontext():
            # Some tests depend on luck: test_training_works fails one time in twenty, on plain linears as well.
            torch.manual_seed(0)
            if replacement is not None:
                replacement.kept_dense = _trained_in_full(item)
                replacement.is_on = item.path.name != QUANTIZES_ITSELF
                replacement.is_exact = item.name.partition("[")[0] not in COMPARES_MEMORY
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
        report = yield
        self._judge(item, report)
        return report

    def _judge(self, item: pytest.Item, report: pytest.TestReport) -> None:
        name = item.nodeid.removeprefix("tests/")
        listed = [entry for entry in self.exceptions if entry.concerns(name)]
        if report.failed and NOT_IN_THE_HUBS_CACHE in report.longreprtext:
            report.outcome, report.wasxfail = "skipped", NEEDS_HUB
            self.counts["skipped_for_the_hub"] += 1
        elif report.failed:
            entry = next((entry for entry in listed if re.search(entry.error, report.longreprtext)), None)
            if entry is None:
                self.counts["failed"] += 1
                self.unexpected.append(name)
                return
            entry.failed.append(name)
            self.counts["expected_failures"] += 1
            report.outcome, report.wasxfail = "skipped", entry.reason
        elif report.skipped:
            for_hub = NEEDS_HUB in report.longreprtext
            self.counts["skipped_for_the_hub" if for_hub else "skipped"] += 1
        elif report.when == "call":
            self.counts["passed"] += 1
            replacement = item.stash[_REPLACEMENT]
            self.counts["passed_on_quantized"] += replacement is not None and replacement.n_adapted > 0
            for entry in listed:
                entry.passed.append(name)

    @property
    def stale(self) -> list[ExpectedFailure]:
        """Entries of which tests ran, and none failed. Only a run of all tests can tell."""
        if not self._is_whole:
            return []
        return [entry for entry in self.exceptions if entry.passed and not entry.failed]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.stale and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        path: Path | None = session.config.getoption("--summary")
        if path is not None:
            add_to(path, self.summary())

    def summary(self) -> dict[str, Any]:
        return {
            "peft": peft.__version__,
            "method": self.method,
            "shard": f"{self._index}/{self._of}",
            **self.counts,
            "unexpected": self.unexpected,
            "stale": [entry.tests for entry in self.stale],
            "exceptions": [
                {
                    "tests": entry.tests,
                    "reason": entry.reason,
                    "failed": len(entry.failed),
                    "passed": len(entry.passed),
                }
                for entry in self.exceptions
                if entry.failed or entry.passed
            ],
        }

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section(f"PEFT's tests on {self.method}")
        terminalreporter.line(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in self.counts.items()))
        for entry in self.stale:
            terminalreporter.line(f"no longer fails, take it off the list: {entry.tests}", red=True)


def add_to(path: Path, summary: dict[str, Any]) -> None:
    """Runs of several methods, versions and shards share a file; a run that was made before is replaced."""
    known = json.loads(path.read_text()) if path.exists() else []
    which = ("peft", "method", "shard")
    others = [run for run in known if any(run[name] != summary[name] for name in which)]
    runs = sorted([*others, summary], key=lambda run: [run[name] for name in which])
    path.write_text(json.dumps(runs, indent=2) + "\n")


_REPLACEMENT = pytest.StashKey[Replacement | None]()


def _trained_in_full(item: pytest.Item) -> list[str]:
    """Modules that the test's config copies and trains whole: a user keeps them dense with ``skip_modules``."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    names: list[str] = []
    for value in parameters.values():
        fields = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        wanted = fields.get("modules_to_save") or []
        names += [wanted] if isinstance(wanted, str) else list(wanted)
    return names


@contextlib.contextmanager
def _no_network() -> Iterator[None]:
    """A test that asks for another host is skipped at once, instead of after minutes of retries."""
    resolve = socket.getaddrinfo

    def resolve_local(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in LOCAL:
            pytest.skip(f"{NEEDS_HUB} ({name})")
        return resolve(host, *args, **kwargs)

    socket.getaddrinfo = resolve_local
    try:
        yield
    finally:
        socket.getaddrinfo = resolve
