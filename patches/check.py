"""Apply each series of patches to its released source, and run the tests: `make patches`.

For every patch: it applies cleanly, the test that it brings fails without its code and passes with it. For every
series: the upstream tests around it pass at the end.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from upstream import source_folder  # noqa: E402

# Upstream tests around what a series changes, for each project.
NEARBY = {
    "peft": [
        "tests/test_custom_models.py::TestDynamicDispatch",
        "tests/test_custom_models.py::TestMultiRankAdapter",
        "tests/test_tuners_utils.py::TestTargetedModuleNames",
        "-k",
        "not test_override_lora_linear and not test_realistic_example",  # these two fetch models from the hub
    ],
}

# Tests of ours that must pass on the patched source too: with the registry, our package uses it.
OURS = {"peft": ["tests/adapters/test_lora.py"]}


def series() -> list[Path]:
    """The folders ``<project>-<version>``."""
    return sorted(folder for folder in Path(__file__).parent.iterdir() if folder.is_dir() and any(folder.iterdir()))


def added_tests(patch: str) -> list[str]:
    """Test files that a patch adds or changes."""
    return re.findall(r"^\+\+\+ b/(tests/test_\w+\.py)$", patch, re.M)


def apply(patch: Path, source: Path, *paths: str) -> None:
    """Apply ``patch``, or only what it does to ``paths``.

    Raises:
        SystemExit: it does not apply cleanly; names the patch, and says what git said.
    """
    chosen = [f"--include={path}" for path in paths]
    command = ["git", "apply", "--whitespace=nowarn", *chosen, str(patch)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{patch.name} does not apply to {source.name}: {done.stderr.strip()}")


def passes(source: Path, tests: list[str], *, root: Path | None = None) -> tuple[bool, str]:
    """Whether pytest passes, and its last lines. A test that is skipped or not collected does not pass.

    The tests lie in ``root``, by default the patched source, and import the patched source.
    """
    root = root or source
    paths = [source / "src", ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(path) for path in paths if path)}
    command = [
        sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(root), "-p", "no:cacheprovider", "-q",
        "--disable-warnings", "--tb=line", *tests,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()]
    return done.returncode == 0 and " passed" in last[0], "\n".join(done.stdout.splitlines()[-15:])


def check(folder: Path, scratch: Path, *, nearby: bool) -> list[str]:
    """Failures of one series, in words; progress goes to standard output."""
    project, _, version = folder.name.rpartition("-")
    source = scratch / folder.name
    shutil.copytree(source_folder(project, version), source)
    (source / "tests" / "__init__.py").touch()
    subprocess.run(
        ["git", "init", "--quiet"], cwd=source, check=True
    )  # so that git apply sees this folder as its root
    problems = []
    for patch in sorted(folder.glob("*.patch")):
        tests = added_tests(patch.read_text())
        if not tests:
            problems.append(f"{patch.name}: brings no test")
            continue
        apply(patch, source, *tests)
        without, _ = passes(source, tests)
        for test in tests:
            (source / test).unlink()
        apply(patch, source)
        with_it, output = passes(source, tests)
        if without:
            problems.append(f"{patch.name}: its test passes without it")
        if not with_it:
            problems.append(f"{patch.name}: its test fails with it:\n{output}")
        print(f"{folder.name}/{patch.name}: without {'passes' if without else 'fails'}, ", end="")
        print(f"with it {'passes' if with_it else 'fails'}", flush=True)
    for whose, tests, root in [("upstream's", NEARBY, source), ("our", OURS, ROOT)]:
        if nearby and project in tests:
            passed, output = passes(source, tests[project], root=root)
            print(f"{folder.name}: {whose} tests: {output.splitlines()[-1] if output else 'none'}", flush=True)
            if not passed:
                problems.append(f"{folder.name}: {whose} tests fail:\n{output}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-nearby", action="store_true", help="only the tests that the patches bring")
    args = parser.parse_args()
    problems = []
    with tempfile.TemporaryDirectory() as scratch:
        for folder in series():
            problems += check(folder, Path(scratch), nearby=not args.no_nearby)
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
