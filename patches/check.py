"""Apply each series of patches to its released source, and run the tests: `make patches`.

For every series: it applies, tests that each of its patches brings or changes fail without its code, and all of them
pass with it. For every project, with all of its series applied: upstream's formatter and linter find nothing, tests of
upstream's around it pass, and so do ours on the patched source. With ``--clone``, the same on the newest commit of a
clone, which has the documentation too.
"""

import argparse
import ast
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
PATCHES = Path(__file__).parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from conformance import run as conformance  # noqa: E402
from upstream import cache_folder, source_folder  # noqa: E402

# The newest release of each project when its patches were written.
RELEASED = {"peft": "0.21.2", "transformers": "5.24.0"}

# Fails on a CPU without any patch: bfloat16 weights meet float32 inputs.
FAILS_UPSTREAM = "shira and bnb_4bit"

# Upstream tests around what the patches change, for each project.
NEARBY = {
    "peft": [
        "tests/test_quantization.py",
        "tests/test_custom_models.py::TestDynamicDispatch",
        "tests/test_custom_models.py::TestMultiRankAdapter",
        "tests/test_tuners_utils.py::TestTargetedModuleNames",
        "tests/test_initialization.py::TestHotSwapping",
        "tests/test_mixed.py",
        "tests/test_osf.py",
        "tests/test_bdlora.py",
        "tests/test_velora.py",
        "-k",  # these fetch models from the hub
        "not test_override_lora_linear and not test_realistic_example and not test_decoder_model"
        f" and not ({FAILS_UPSTREAM})",
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

# Tests of ours that show what a new PEFT breaks.
ON_MAIN = ["tests/lora", "tests/scales", "tests/integrations/test_private_peft_names.py"]

# For `make quality` there, beside the version of ruff that its setup.py asks for.
STYLE_TOOLS = ("hf-doc-builder", "black", "griffe", "requests")

# The name of a check, and what runs it: whether it passes, and its last lines.
Check = tuple[str, Callable[[], tuple[bool, str]]]


def series(project: str) -> list[Path]:
    """The folders of a project's series, in the order in which they are submitted."""
    return sorted(folder for folder in (PATCHES / project).iterdir() if folder.is_dir())


def changed_files(patch: Path) -> list[str]:
    """Files that a patch adds or changes."""
    return re.findall(r"^\+\+\+ b/(\S+)$", patch.read_text(), re.M)


def test_files(patch: Path) -> list[str]:
    """Files with tests among them."""
    return [file for file in changed_files(patch) if re.fullmatch(r"tests/(?:\w+/)*test_\w+\.py", file)]


def test_functions(text: str) -> list[tuple[str, range]]:
    """The tests of a file, each with its lines, decorators included."""
    return [
        (node.name, range(min(part.lineno for part in (node, *node.decorator_list)), (node.end_lineno or 0) + 1))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


class Source:
    """A copy of one project's source, in git, to which patches are applied."""

    def __init__(self, project: str, folder: Path, scratch: Path) -> None:
        self.project = project
        self.folder = folder
        self.name = folder.name
        self._hub = scratch / "hub"

    def git(self, *arguments: str) -> None:
        """Run git. Raises SystemExit with what it said where it fails."""
        done = self._git(*arguments)
        if done.returncode != 0:
            raise SystemExit(f"{self.name}: git {' '.join(arguments)}: {done.stderr.strip()}")

    def _git(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-c", "user.name=check", "-c", "user.email=check@example.com", *arguments]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)

    def commit(self) -> None:
        """Make a repository of the folder as it is."""
        for command in (["init", "--quiet"], ["add", "--all", "--force"], ["commit", "--quiet", "-m", "upstream"]):
            self.git(*command)

    def apply(self, patch: Path) -> str:
        """Apply ``patch`` as a maintainer would, from its mail. What had to be done to make it fit, in words.

        A source distribution has no documentation, so that part is left out there. Lines around a change may have
        moved on in a clone: one of them has to agree then, not three.
        """
        excluded = [] if (self.folder / "docs").exists() else ["--exclude=docs/*"]
        if self._git("am", "--quiet", *excluded, str(patch)).returncode == 0:
            return ""
        self._git("am", "--abort")
        self.git("am", "--quiet", "-C1", *excluded, str(patch))
        return ", with one line of context"

    def apply_tests(self, patch: Path) -> set[str]:
        """Apply and commit what ``patch`` does to ``tests/``, and nothing else. The test functions that it touches."""
        self.git("apply", "-C1", "--include=tests/*", str(patch))
        touched = set()
        for file in test_files(patch):
            diff = self._git("diff", "--unified=0", "--", file).stdout
            functions = test_functions((self.folder / file).read_text())
            whole_file = not diff  # git does not know it yet
            for start, count in re.findall(r"^@@ \S+ \+(\d+)(?:,(\d+))? @@", diff, re.M):
                lines = range(int(start), int(start) + int(count or 1))
                touched |= {name for name, span in functions if set(span) & set(lines)}
            touched |= {name for name, _ in functions if whole_file}
        self.git("add", "--all", "--force")
        self.git("commit", "--quiet", "-m", "tests")
        return touched

    def pytest(self, *arguments: str, root: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run pytest on tests in ``root``, by default this source. They import this source."""
        paths = [self.folder / "src", ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if root is None:
            root = self.folder
            if not self._hub.exists():
                subprocess.run([sys.executable, str(PATCHES / "hub_stand_in.py"), str(self._hub)], check=True)
            environment |= {"HF_HOME": str(self._hub), "HF_HUB_OFFLINE": "1"}
        command = [
            sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(root), "-p", "no:cacheprovider", "-q",
            "--disable-warnings", "--tb=line", *arguments,
        ]  # fmt: skip
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def outcome(done: subprocess.CompletedProcess[str], *, may_skip: bool = False) -> tuple[bool, str]:
    """Whether pytest passed, and its last lines. A test that is skipped or not collected does not pass."""
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    passed = done.returncode == 0 and " passed" in lines[-1] and (may_skip or " skipped" not in lines[-1])
    return passed, "\n".join(lines[-15:])


def released_source(project: str, scratch: Path) -> Source:
    """The released source, with what its tests need and the source distribution leaves out."""
    released = source_folder(project, RELEASED[project])
    folder = scratch / released.name
    shutil.copytree(released, folder, ignore=shutil.ignore_patterns("__pycache__", conformance.OURS))
    (folder / "tests" / "__init__.py").touch()
    if project == "transformers":
        shutil.copyfile(PATCHES / "llama_common.py", folder / "tests" / "test_llama_common.py")
        # The common tests inherit from these two, which test export and generation.
        for module, mixin in [("exporters/test_export", "Export"), ("generation/test_utils", "Generation")]:
            file = folder / "tests" / f"{module}.py"
            file.parent.mkdir()
            (file.parent / "__init__.py").touch()
            file.write_text(f"class {mixin}TesterMixin:\n    pass\n")
    source = Source(project, folder, scratch)
    source.commit()
    return source


def cloned_source(project: str, clone: str, scratch: Path) -> Source:
    """The newest commit of ``clone``, the path or address of a git repository. Raises SystemExit without it."""
    folder = scratch / f"{project}-main"
    command = ["git", "clone", "--quiet", "--depth", "1", clone, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{project} could not be cloned from {clone}: {done.stderr.strip()}")
    return Source(project, folder, scratch)


def check_series(folder: Path, source: Source) -> list[str]:
    """Apply one series, first its tests and then all of it. Its failures, in words."""
    patches = sorted(folder.glob("*.patch"))
    touched = {patch.name: source.apply_tests(patch) for patch in patches}
    files = sorted({file for patch in patches for file in test_files(patch)})
    names = set().union(*touched.values())
    selection = [*files, "-k", f"({' or '.join(sorted(names))}) and not ({FAILS_UPSTREAM})"]
    without = source.pytest(*selection, "-rfE")
    failed = set(re.findall(r"^(?:FAILED|ERROR) \S+::(test_\w+)", without.stdout, re.M))
    if re.search(r"^ERROR \S+\.py(?: |$)", without.stdout, re.M):  # imports what is not there without the code
        failed = names
    source.git("reset", "--quiet", "--hard", f"HEAD~{len(patches)}")
    how = {source.apply(patch) for patch in patches}
    with_it = source.pytest(*selection, "-rp")
    passed, output = outcome(with_it, may_skip=True)
    ran = set(re.findall(r"^PASSED \S+::(test_\w+)", with_it.stdout, re.M))
    print(f"{source.name}, {folder.name}: {len(patches)} patches apply{max(how)}", flush=True)
    print(f"    without them: {outcome(without)[1].splitlines()[-1]}", flush=True)
    print(f"    with them:    {output.splitlines()[-1]}", flush=True)
    problems = [
        f"{name}: none of its tests fails without it"
        for name, tests in touched.items()
        if not any(test.startswith(tuple(tests)) for test in failed)  # parameterized adds a number to a name
    ]
    problems += [
        f"{folder.name}: {name} is not run" for name in names if not any(test.startswith(name) for test in ran)
    ]
    return problems + ([] if passed else [f"{folder.name}: its tests fail with it:\n{output}"])


def style_tools(source: Source) -> Path:
    """The ``bin`` folder of an environment with the formatters of upstream; made on the first call, then cached."""
    # The very version that is named: a newer one has more rules, which upstream's own code breaks.
    (version,) = set(re.findall(r'"ruff[~=]=([^"]+)"', (source.folder / "setup.py").read_text()))
    ruff = f"ruff=={version}"
    environment = cache_folder() / "environments" / re.sub(r"\W+", "-", ruff)
    if not (environment / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
        pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--quiet", ruff, *STYLE_TOOLS]
        subprocess.run(pip, check=True)
        (environment / "complete").touch()
    return environment / "bin"


def style(source: Source) -> tuple[bool, str]:
    """Whether upstream's formatters and linters find nothing, and what they say.

    In a clone of PEFT its own ``make quality``. A source distribution has no Makefile: there the same tools, on what
    the patches change.
    """
    tools = style_tools(source)
    if source.project == "peft" and (source.folder / "Makefile").exists():
        environment = os.environ | {"PATH": os.pathsep.join([str(tools), os.environ["PATH"]])}
        done = subprocess.run(
            ["make", "quality"], cwd=source.folder, env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    patches = [patch for folder in series(source.project) for patch in folder.glob("*.patch")]
    changed = sorted({file for patch in patches for file in changed_files(patch)})
    present = [file for file in changed if (source.folder / file).exists()]
    python = [file for file in present if file.endswith(".py")]
    commands = [["ruff", "check", *python], ["ruff", "format", "--check", *python]]
    if source.project == "peft":
        commands.append(["doc-builder", "style", *python, "--max_len", "119", "--check_only"])
    for command in commands:
        done = subprocess.run(
            [str(tools / command[0]), *command[1:]], cwd=source.folder, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            return False, f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-2000:]}"
    return True, f"{len(present)} files"


def conforms(source: Source, method: str) -> tuple[bool, str]:
    """Whether all of PEFT's tests of quantized models pass on our layers, where the list of exceptions names some."""
    conformance.prepare(source.folder)
    summary = source.folder / f"summary-{method}.json"
    arguments = ["--summary", str(summary), "-k", "TestQuantization"]
    command = conformance.pytest_command(source.folder, method, files=[conformance.OURS], arguments=arguments)
    environment = conformance.environment(source.folder)
    done = subprocess.run(command, cwd=source.folder, env=environment, capture_output=True, text=True, check=False)
    [counts] = json.loads(summary.read_text()) if summary.exists() else [{}]
    passed = done.returncode == 0 and counts["passed"] > 0 and counts["expected_failures"] == 0
    return passed, done.stdout[-2000:]


def around(source: Source) -> list[Check]:
    """What to run on the source with all series applied, with a name for each."""
    project = source.project
    checks: list[Check] = [
        ("upstream's tests", lambda: outcome(source.pytest(*NEARBY[project]), may_skip=True)),
        ("our tests", lambda: outcome(source.pytest(*OURS[project], root=ROOT))),
    ]
    if project == "peft":
        checks += [
            (f"upstream's quantization tests on our layers, {method}", lambda method=method: conforms(source, method))
            for method in ("hqq", "aqlm")
        ]
    return checks


def check_unpatched(source: Source) -> list[str]:
    """Failures of our tests on a source of PEFT as it is, in words."""
    checks = [("our tests", lambda: outcome(source.pytest(*ON_MAIN, root=ROOT), may_skip=True))]
    return run_checks(source, checks)


def check(source: Source, *, nearby: bool) -> list[str]:
    """Failures of all series of a project, in words; progress goes to standard output."""
    problems = []
    for folder in series(source.project):
        problems += check_series(folder, source)
    checks = [("style", lambda: style(source)), *(around(source) if nearby else [])]
    return problems + run_checks(source, checks)


def run_checks(source: Source, checks: list[Check]) -> list[str]:
    """Failures of ``checks``, in words; progress goes to standard output."""
    problems = []
    for name, run in checks:
        started = time.monotonic()
        passed, output = run()
        print(f"{source.name}, {name}: {'pass' if passed else 'FAIL'}, {time.monotonic() - started:.0f} s", flush=True)
        print(f"    {output.strip().splitlines()[-1]}", flush=True)
        if not passed:
            problems.append(f"{source.name}: {name} fail:\n{output}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-nearby", action="store_true", help="only the style and the patches' own tests")
    parser.add_argument("--only", choices=RELEASED, help="only this project")
    parser.add_argument(
        "--clone", metavar="PATH", help="with --only: on the newest commit of this git repository, not on the release"
    )
    parser.add_argument("--unpatched", action="store_true", help="with --clone: only our tests, without any patch")
    args = parser.parse_args()
    if args.clone and not args.only:
        parser.error("--clone needs --only, which says whose repository it is")
    if args.unpatched and not args.clone:
        parser.error("--unpatched needs --clone")
    problems = []
    for project in [args.only] if args.only else RELEASED:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            source = cloned_source(project, args.clone, scratch) if args.clone else released_source(project, scratch)
            problems += check_unpatched(source) if args.unpatched else check(source, nearby=not args.no_nearby)
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
