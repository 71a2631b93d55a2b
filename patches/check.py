"""Apply each series of patches to its released source, and run the tests: `make patches`.

For every patch: it applies cleanly, the test that it brings fails without its code and passes with it. For every
series: upstream tests around it pass at the end, and so do ours on the patched source.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from conformance import run as conformance  # noqa: E402
from upstream import source_folder  # noqa: E402

# Upstream tests around what a series changes, for each project.
NEARBY = {
    "peft": [
        "tests/test_custom_models.py::TestDynamicDispatch",
        "tests/test_custom_models.py::TestMultiRankAdapter",
        "tests/test_tuners_utils.py::TestTargetedModuleNames",
        "tests/test_initialization.py::TestHotSwapping",
        "tests/test_mixed.py",
        "tests/test_osf.py",
        "tests/test_bdlora.py",
        "tests/test_velora.py",
        "-k",  # these fetch models from the hub
        "not test_override_lora_linear and not test_realistic_example and not test_decoder_model",
    ],
    "transformers": ["tests/test_llama_common.py", "tests/test_monkey_patching.py"],
}

# Tests of ours that must pass on the patched source too: with PEFT's registries our package uses them, and with
# transformers' own HQQ and AQLM restored it still takes their place.
OURS = {
    "peft": ["tests/lora/test_layer.py", "tests/lora/test_quantization_backend.py"],
    "transformers": [
        "tests/interop/test_hqq_checkpoints.py::test_nothing_is_reported_missing_or_unexpected",
        "tests/interop/test_hqq_checkpoints.py::test_a_loaded_model_saves_and_loads_as_ours",
        "tests/interop/test_aqlm_package.py",
        "tests/integrations/test_transformers.py",
    ],
}


def series() -> list[Path]:
    """The folders ``<project>-<version>``."""
    return sorted(folder for folder in Path(__file__).parent.iterdir() if folder.is_dir() and any(folder.iterdir()))


def added_tests(patch: str) -> list[str]:
    """Test files that a patch adds or changes."""
    return re.findall(r"^\+\+\+ b/(tests/(?:\w+/)*test_\w+\.py)$", patch, re.M)


def prepared_source(project: str, version: str, scratch: Path) -> Path:
    """A copy of the released source to patch, with what its tests need and the source distribution leaves out."""
    released = source_folder(project, version)
    source = scratch / released.name
    shutil.copytree(released, source, ignore=shutil.ignore_patterns("__pycache__", conformance.OURS))
    (source / "tests" / "__init__.py").touch()
    if project == "transformers":
        shutil.copyfile(Path(__file__).parent / "llama_common.py", source / "tests" / "test_llama_common.py")
        # The common tests inherit from these two, which test export and generation.
        for module, mixin in [("exporters/test_export", "Export"), ("generation/test_utils", "Generation")]:
            file = source / "tests" / f"{module}.py"
            file.parent.mkdir()
            (file.parent / "__init__.py").touch()
            file.write_text(f"class {mixin}TesterMixin:\n    pass\n")
    for command in (["init", "--quiet"], ["add", "--all", "--force"], ["commit", "--quiet", "-m", "released"]):
        git(source, *command)
    return source


def git(source: Path, *arguments: str) -> None:
    """Run git in ``source``. Raises SystemExit with what it said where it fails."""
    command = ["git", "-c", "user.name=check", "-c", "user.email=check@example.com", *arguments]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{source.name}: git {' '.join(arguments)}: {done.stderr.strip()}")


def apply_tests(patch: Path, source: Path, tests: list[str]) -> None:
    """Apply what ``patch`` does to ``tests``, and nothing else of it."""
    git(source, "apply", "--whitespace=nowarn", *(f"--include={test}" for test in tests), str(patch))


def apply(patch: Path, source: Path) -> None:
    """Apply ``patch`` as a maintainer would, from its mail."""
    git(source, "am", "--quiet", "--whitespace=nowarn", str(patch))


def passes(source: Path, tests: list[str], *, root: Path | None = None, may_skip: bool = False) -> tuple[bool, str]:
    """Whether pytest passes, and its last lines. A test that is skipped or not collected does not pass.

    The tests lie in ``root``, by default the patched source, and import the patched source.
    """
    root = root or source
    paths = [source / "src", ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [
        sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(root), "-p", "no:cacheprovider", "-q",
        "--disable-warnings", "--tb=line", *tests,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    passed = done.returncode == 0 and " passed" in lines[-1] and (may_skip or " skipped" not in lines[-1])
    return passed, "\n".join(lines[-15:])


def conforms(source: Path, method: str) -> tuple[bool, str]:
    """Whether all of PEFT's tests of quantized models pass on our layers, where the list of exceptions names some."""
    conformance.prepare(source)
    summary = source / f"summary-{method}.json"
    arguments = ["--summary", str(summary), "-k", "TestQuantization"]
    command = conformance.pytest_command(source, method, files=[conformance.OURS], arguments=arguments)
    environment = conformance.environment(source)
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    [counts] = json.loads(summary.read_text()) if summary.exists() else [{}]
    passed = done.returncode == 0 and counts["passed"] > 0 and counts["expected_failures"] == 0
    return passed, done.stdout[-2000:]


def around(project: str, source: Path) -> list[tuple[str, Callable[[], tuple[bool, str]]]]:
    """What to run on the source with the whole series applied, with a name for each."""
    checks: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
        ("upstream's tests", lambda: passes(source, NEARBY[project], may_skip=True)),
        ("our tests", lambda: passes(source, OURS[project], root=ROOT)),
    ]
    if project == "peft":
        checks += [
            (f"upstream's quantization tests on our layers, {method}", lambda method=method: conforms(source, method))
            for method in ("hqq", "aqlm")
        ]
    return checks


def check_patch(patch: Path, source: Path) -> list[str]:
    """Apply one patch, first its tests and then all of it. Its failures, in words."""
    tests = added_tests(patch.read_text())
    if not tests:
        return [f"{patch.name}: brings no test"]
    apply_tests(patch, source, tests)
    without, failing = passes(source, tests)
    for test in tests:
        (source / test).unlink()
    apply(patch, source)
    with_it, output = passes(source, tests)
    state = {True: "passes", False: "fails"}
    print(f"{source.name}/{patch.name}", flush=True)
    print(f"    without it {state[without]}: {failing.splitlines()[-1]}", flush=True)
    print(f"    with it    {state[with_it]}: {output.splitlines()[-1]}", flush=True)
    problems = [f"{patch.name}: its test passes without it"] if without else []
    return problems + ([] if with_it else [f"{patch.name}: its test fails with it:\n{output}"])


def check(folder: Path, scratch: Path, *, nearby: bool) -> list[str]:
    """Failures of one series, in words; progress goes to standard output."""
    project, _, version = folder.name.rpartition("-")
    source = prepared_source(project, version, scratch)
    problems = []
    for patch in sorted(folder.glob("*.patch")):
        problems += check_patch(patch, source)
    for name, run in around(project, source) if nearby else []:
        started = time.monotonic()
        passed, output = run()
        print(f"{folder.name}, {name}: {'pass' if passed else 'FAIL'}, {time.monotonic() - started:.0f} s", flush=True)
        print(f"    {output.strip().splitlines()[-1]}", flush=True)
        if not passed:
            problems.append(f"{folder.name}: {name} fail:\n{output}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-nearby", action="store_true", help="only the tests that the patches bring")
    parser.add_argument("--only", default="", help="only series whose name starts so, for example peft")
    args = parser.parse_args()
    problems = []
    with tempfile.TemporaryDirectory() as scratch:
        for folder in series():
            if folder.name.startswith(args.only):
                problems += check(folder, Path(scratch), nearby=not args.no_nearby)
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
