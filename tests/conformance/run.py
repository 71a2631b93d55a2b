"""Run PEFT's own tests on quantized layers: `python tests/conformance/run.py --peft 0.21.2 --method hqq`.

Source and tests are those of PEFT's source distribution at that version, whatever PEFT is installed.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from upstream import source_folder  # noqa: E402

# The supported range of PEFT; both ends are tested.
LOWEST, NEWEST = "0.21.0", "0.21.2"
OURS = "test_quantization_on_ours.py"
FILES = (
    "test_custom_models.py",
    "test_lora_variants.py",
    "test_bdlora.py",
    "test_velora.py",
    "test_mixed.py",
    OURS,
)
# Small classes whole, and the merging of every LoRA variant.
QUICK_FILES = ("test_custom_models.py", "test_bdlora.py", OURS)
# On the two ends of the range of PEFT's versions; half a minute each.
QUICK_METHODS = (("hqq", LOWEST), ("hqq", NEWEST))
# By hand: all others, and why they are left to `make conformance`.
NOT_QUICK = {
    "aqlm": "a minute or more, for the layer that all methods share; tests/contract and tests/lora run it",
    "nf4": "the default product and the default merge, which tests/contract and tests/lora run",
}
QUICK = (
    "test_mixed_adapter_batches_mlp or DynamicDispatch or MultiRank or BdLora or TestQuantization "
    "or (Vanilla and LoRA and not GLoRA and (test_merge_layers[ or test_disable_adapters_with_merging[))"
)


def pytest_command(
    source: Path, method: str, *, files: Sequence[str] = FILES, arguments: Sequence[str] = ()
) -> list[str]:
    """The command that runs ``files`` of ``source`` with ``method``; to be started in that folder."""
    return [
        sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(source), "-p", "conformance.plugin",
        "-p", "no:cacheprovider", "-q", "--tb=short", "--disable-warnings", "--method", method, *arguments,
        *(f"tests/{file}" for file in files),
    ]  # fmt: skip


def prepared_source(version: str) -> Path:
    """PEFT's source folder at ``version``, ready for :func:`pytest_command`."""
    return prepare(source_folder("peft", version))


def prepare(source: Path) -> Path:
    """Make the tests of ``source`` a package that pytest can import, with our loaders for the quantization tests."""
    (source / "tests" / "__init__.py").touch()
    shutil.copyfile(TESTS / "conformance" / "quantization_on_ours.py", source / "tests" / OURS)
    return source


def environment(source: Path) -> dict[str, str]:
    """PEFT from ``source`` goes before the installed one. Tests that ask for the hub are skipped by the plugin."""
    path = [source / "src", TESTS, TESTS.parent, TESTS.parent / "kernels", os.environ.get("PYTHONPATH", "")]
    settings = {"PYTHONPATH": os.pathsep.join(str(entry) for entry in path if entry), "OMP_NUM_THREADS": "1"}
    return {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | settings


def run(version: str, method: str, *, files: Sequence[str] = FILES, arguments: Sequence[str] = (), **kwargs) -> int:
    """Exit status of pytest: 0 when nothing failed but what the list of exceptions names."""
    source = prepared_source(version)
    command = pytest_command(source, method, files=files, arguments=arguments)
    return subprocess.run(command, cwd=source, env=environment(source), check=False, **kwargs).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft", default=NEWEST, help="version of PEFT (default: %(default)s)")
    parser.add_argument("--method", default="hqq", help="what replaces nn.Linear: a name in linears.SPECS, or dense")
    parser.add_argument("--files", nargs="+", default=list(FILES), help="test files of PEFT")
    args, arguments = parser.parse_known_args()
    sys.exit(run(args.peft, args.method, files=args.files, arguments=[_absolute(part) for part in arguments]))


def _absolute(argument: str) -> str:
    """``--summary FILE`` is meant from where the user stands; pytest runs in the source folder."""
    return str(Path(argument).resolve()) if argument.endswith(".json") else argument


if __name__ == "__main__":
    main()
