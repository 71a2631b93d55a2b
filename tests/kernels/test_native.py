"""The compiled kernels are there where they can be, can be switched off, and a wrong library is not used."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from quantlayers_kernels import native
from quantlayers_kernels.bitpack import pack
from quantlayers_kernels.hqq import hqq_linear
from quantlayers_kernels.hqq.reference import hqq_linear_reference

COMPILER = (sysconfig.get_config_var("CC") or "cc").split()[0]


@pytest.fixture
def fresh_library():
    """The library is looked for again in the test, and once more after it."""
    for cached in (native.library, native.variant):
        cached.cache_clear()
    yield
    for cached in (native.library, native.variant):
        cached.cache_clear()


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C compiler")
@pytest.mark.skipif(native.SWITCH in os.environ, reason="switched off")
def test_the_kernels_are_built_where_there_is_a_compiler():
    assert native.is_available(), "build them: pip install -e ., or python setup.py build_ext --inplace"


def test_a_build_without_a_compiler_succeeds_without_the_kernels(tmp_path):
    pytest.importorskip("setuptools")
    source = Path(__file__).parents[2]
    built = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *built],
        cwd=source,
        env=os.environ | {"CC": "no-such-compiler", "LDSHARED": "no-such-compiler -shared"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "no-such-compiler" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.so"))


def layer_output():
    torch.manual_seed(0)
    W_q = pack(torch.randint(0, 8, (70, 128), dtype=torch.uint8), 3)
    return hqq_linear(torch.randn(2, 128), W_q, torch.rand(70, 2), torch.rand(70, 2), None, 3, 1)


@pytest.mark.parametrize(("value", "is_off"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_the_environment_switches_them_off(value, is_off, fresh_library, monkeypatch):
    """The product is the same up to rounding."""
    was_available = native.is_available()
    native.library.cache_clear()
    monkeypatch.setenv(native.SWITCH, value)
    assert native.is_available() == (not is_off and was_available)
    torch.manual_seed(0)
    W_q = pack(torch.randint(0, 8, (70, 128), dtype=torch.uint8), 3)
    args = (torch.randn(2, 128), W_q, torch.rand(70, 2), torch.rand(70, 2), None)
    expected = hqq_linear_reference(*args, nbits=3, axis=1)
    torch.testing.assert_close(layer_output(), expected)


def test_a_library_of_another_interface_is_refused_with_a_warning(fresh_library, monkeypatch, caplog):
    if not native.is_available():
        pytest.skip("the compiled kernels were not built")
    native.library.cache_clear()
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE ^ 1)
    assert not native.is_available()
    assert "built for another interface" in caplog.text


def test_a_file_that_does_not_load_is_refused_with_a_warning(fresh_library, monkeypatch, caplog, tmp_path):
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a library")
    spec = native.importlib.util.spec_from_file_location("broken", broken)
    monkeypatch.delenv(native.SWITCH, raising=False)
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(spec, "origin", str(broken))
    assert not native.is_available()
    assert "does not load" in caplog.text


def test_a_failed_kernel_raises(monkeypatch):
    class WithoutMemory:
        def ql_hqq_linear(self, *arguments):
            return -1

    monkeypatch.setattr(native, "library", WithoutMemory)
    monkeypatch.setattr(native, "variant", lambda: 0)
    with pytest.raises(MemoryError, match="ql_hqq_linear"):
        native.call("ql_hqq_linear")


def test_a_call_counts_threads_as_torch_does(monkeypatch):
    seen = []

    class Recorder:
        def ql_hqq_linear(self, *arguments):
            seen.append(arguments)
            return 0

    monkeypatch.setattr(native, "library", Recorder)
    monkeypatch.setattr(native, "variant", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    native.call("ql_hqq_linear", 3)
    assert seen == [(3, 7, 1)]


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(n_threads):
    """Each row is one thread's, so a race or a row done twice would show; more threads than cores provoke one."""
    if not native.is_available():
        pytest.skip("the compiled kernels were not built")
    W_q = pack(torch.randint(0, 16, (1003, 256), dtype=torch.uint8), 4)
    scale, zero = torch.rand(1003, 4), 15 * torch.rand(1003, 4)
    inputs = [torch.randn(n_tokens, 256) for n_tokens in (1, 5)]
    expected = [hqq_linear(x, W_q, scale, zero, None, 4, 1) for x in inputs]
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        for _ in range(10):
            for x, y in zip(inputs, expected, strict=True):
                assert torch.equal(hqq_linear(x, W_q, scale, zero, None, 4, 1), y)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("choice", ["baseline", "avx2", "AVX512", "auto", "", "torch"])
def test_the_environment_chooses_the_instruction_set(choice, fresh_library, monkeypatch, caplog):
    if not native.is_available():
        pytest.skip("the compiled kernels were not built")
    best = native.VARIANTS[native.library().ql_best_variant()]
    native.library.cache_clear()
    monkeypatch.setenv(native.CHOICE, choice)
    layer_output()
    wanted = choice.lower() if choice.lower() in native.VARIANTS else best
    used = min(wanted, best, key=native.VARIANTS.index)
    found = (native.is_available(), native.VARIANTS[native.variant()])
    assert found == ((False, "baseline") if choice == "torch" else (True, used))
    assert ("this CPU has none of it" in caplog.text) == (used != wanted)


def test_an_unknown_instruction_set_is_refused_with_those_that_there_are():
    """In a process of its own, as users meet it."""
    program = "import torch\nfrom quantlayers_kernels import native\nnative.library()"
    environment = os.environ | {native.CHOICE: "sse9"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode
    assert "PEFT_QUANTLAYERS_CPU='sse9' is unknown. Choose from ('auto', 'torch', 'baseline'" in done.stderr


def test_a_missing_library_is_said_once_at_the_first_use(fresh_library, monkeypatch, caplog):
    monkeypatch.delenv(native.SWITCH, raising=False)
    monkeypatch.delenv(native.CHOICE, raising=False)
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    args = (torch.randn(2, 128), pack(torch.randint(0, 8, (70, 128), dtype=torch.uint8), 3))
    for _ in range(2):
        hqq_linear(*args, torch.rand(70, 2), torch.rand(70, 2), None, 3, 1)
    assert caplog.text.count("the compiled CPU kernels were not built") == 1
    assert "C compiler" in caplog.text
    native.library.cache_clear()
    caplog.clear()
    monkeypatch.setenv(native.CHOICE, "torch")
    assert not native.is_available()
    assert not caplog.text


@pytest.mark.parametrize("has_compiler", [True, False])
def test_a_wheel_is_tagged_by_what_is_in_it(has_compiler, tmp_path):
    """The compiler that there is only makes the files that it is asked for."""
    pytest.importorskip("setuptools")
    root, source = Path(__file__).parents[2], tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "build")
    for name in ("kernels", "peft_quantlayers"):
        shutil.copytree(root / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source / name)
    compiler = tmp_path / "compiler.py"
    compiler.write_text("import sys\nopen(sys.argv[sys.argv.index('-o') + 1], 'w').write('built')\n")
    command = f"{sys.executable} {compiler}" if has_compiler else "no-such-compiler"
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path / "dist")],
        cwd=source,
        env=os.environ | {"CC": command, "LDSHARED": command},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if "_native" in name]
    assert bool(libraries) == has_compiler
    assert wheel.name.endswith("-py3-none-any.whl") != has_compiler
    assert ("cp311-abi3-" in wheel.name) == has_compiler
    assert ("were not built" in done.stdout + done.stderr) != has_compiler
