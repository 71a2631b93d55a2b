"""The Triton kernels are built for GPUs that are not here, run in Triton's interpreter, and can be switched off.

What is compiled is what a model's layers would launch: the arguments are recorded from the functions that launch.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from quantlayers_kernels import gpu
from quantlayers_kernels.aqlm import gpu as aqlm_gpu
from quantlayers_kernels.bitpack import packed_row_bytes
from quantlayers_kernels.hqq import gpu as hqq_gpu

INTERPRETED = Path(__file__).parent / "interpreted"
# Shared memory that a program may have on sm_89, the smallest of NVIDIA's three, and on AMD's.
MAX_SHARED, MAX_SHARED_OF_AMD = 99 * 1024, 64 * 1024
OUT, IN, GROUP_SIZE = 4096, 4096, 64

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_the_kernels_are_right_in_tritons_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize(("value", "is_off"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_the_environment_switches_them_off(value, is_off, monkeypatch):
    monkeypatch.setenv(gpu.SWITCH, value)
    gpu.is_available.cache_clear()
    assert gpu.is_available() == (not is_off and importlib.util.find_spec("triton") is not None)
    gpu.is_available.cache_clear()


def test_the_package_works_without_triton():
    program = (
        "import importlib.util, sys\n"
        "sys.modules['triton'] = None\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import quantlayers_kernels.hqq, quantlayers_kernels.aqlm\n"
        "from quantlayers_kernels import gpu\n"
        "assert not gpu.is_available()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class Launches:
    """Stands for a kernel: keeps what it is launched with."""

    def __init__(self) -> None:
        self.arguments, self.constants = (), {}

    def __getitem__(self, grid):
        assert all(0 < size < 65536 for size in grid[1:])
        return self

    def __call__(self, *arguments, **constants) -> None:
        self.arguments, self.constants = arguments, constants


def hqq_weight(nbits: int) -> tuple[torch.Tensor, ...]:
    metadata = torch.empty(OUT, IN // GROUP_SIZE, dtype=torch.float16)
    return torch.empty(OUT, packed_row_bytes(IN, nbits), dtype=torch.uint8), metadata, metadata


def aqlm_weight(num_codebooks: int, nbits: int, in_group: int = 8) -> tuple[torch.Tensor, ...]:
    codes = torch.empty(OUT, IN // in_group, num_codebooks, dtype=torch.int8 if nbits == 8 else torch.int16)
    return codes, torch.empty(num_codebooks, 2**nbits, 1, in_group).half(), torch.empty(OUT, 1, 1, 1).half()


def launch(scheme: int | tuple[int, ...], kernel: str, dtype: torch.dtype, n_tokens: int) -> None:
    """Do what a layer of ``scheme``, bits of HQQ or (codebooks, bits, group) of AQLM, does to run ``kernel``."""
    x = torch.empty(n_tokens, IN, dtype=dtype)
    into, rows = torch.empty(OUT, IN, dtype=dtype), slice(0, OUT)
    if isinstance(scheme, int):
        weight = hqq_weight(scheme)
        if kernel == "dequantize":
            hqq_gpu.dequantize_rows(*weight, nbits=scheme, rows=rows, into=into)
        else:
            assert hqq_gpu.can_use_few_tokens(x, *weight, None, nbits=scheme, axis=1)
            hqq_gpu.linear_few_tokens(x, *weight, None, nbits=scheme)
        return
    weight = aqlm_weight(*scheme)
    if kernel == "dequantize":
        aqlm_gpu.dequantize_rows(*weight, rows=rows, into=into)
    else:
        assert aqlm_gpu.can_use_few_tokens(x, *weight, None)
        aqlm_gpu.linear_few_tokens(x, *weight, None)


def compiled(scheme, kernel: str, target: str, dtype: torch.dtype, n_tokens: int, monkeypatch):
    """The kernel as ``target`` would get it, and its memory outside of registers in bytes, None where unknown."""
    from quantlayers_kernels.aqlm import triton_kernels as aqlm_kernels
    from quantlayers_kernels.hqq import triton_kernels as hqq_kernels

    module = hqq_kernels if isinstance(scheme, int) else aqlm_kernels
    function, launches = getattr(module, kernel), Launches()
    with monkeypatch.context() as patch:
        patch.setattr(module, kernel, launches)
        launch(scheme, kernel, dtype, n_tokens)
    return built_for(target, function, launches)


def built_for(target: str, function, launches: Launches):
    """``function`` as ``target`` would get it for a recorded launch, and what it spills."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8"}
    pointers |= {torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32"}
    signature, constants, attributes = {}, dict(launches.constants), {}
    options = {"num_warps": constants.pop("num_warps")} if "num_warps" in constants else {}
    for index, (name, value) in enumerate(zip(function.arg_names, launches.arguments, strict=False)):
        is_specialized = not function.params[index].do_not_specialize
        if value is None or (is_specialized and value is not None and not torch.is_tensor(value) and value == 1):
            constants[name] = value
        else:
            signature[name] = pointers[value.dtype] if torch.is_tensor(value) else "i32"
            if torch.is_tensor(value) or (is_specialized and value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
    signature = {name: signature.get(name, "constexpr") for name in function.arg_names}
    source = ASTSource(
        function, signature, {(function.arg_names.index(k),): v for k, v in constants.items()}, attributes
    )
    arch = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    built = triton.compile(source, target=arch, options=options)
    return built, None if arch.backend == "hip" else _spilled(built.asm["cubin"])


def _spilled(cubin: bytes) -> int:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


KERNELS = [("dequantize", 1), ("one_token", 1), ("few_tokens", 16), ("few_tokens", 64)]
ONE_BY_EIGHT, TWO_BY_EIGHT, ONE_BY_SIXTEEN, EIGHT_BY_EIGHT = (1, 8), (2, 8), (1, 16), (8, 8, 32)
ALL = (1, 2, 3, 4, 8, ONE_BY_EIGHT, TWO_BY_EIGHT, ONE_BY_SIXTEEN, EIGHT_BY_EIGHT)
CASES = [
    *((scheme, "sm_90", torch.bfloat16) for scheme in ALL),
    *((scheme, target, torch.float16) for scheme in ALL for target in ("sm_80", "sm_89")),
    *((scheme, "sm_90", torch.float32) for scheme in (4, TWO_BY_EIGHT)),
    *((scheme, "gfx942", torch.float16) for scheme in ALL),
]


@needs_triton
@pytest.mark.usefixtures("triton_on_cpu")
@pytest.mark.parametrize(("kernel", "n_tokens"), KERNELS)
@pytest.mark.parametrize(("scheme", "target", "dtype"), CASES, ids=str)
def test_a_layers_kernels_compile_for_gpus(scheme, target, dtype, kernel, n_tokens, monkeypatch):
    if kernel == "few_tokens" and dtype == torch.float32:
        pytest.skip("several tokens in float32 go to cuBLAS")
    is_amd = target.startswith("gfx")
    monkeypatch.setattr(gpu, "has_little_shared_memory", lambda: is_amd)
    built, spilled = compiled(scheme, kernel, target, dtype, n_tokens, monkeypatch)
    assert built.metadata.shared <= (MAX_SHARED_OF_AMD if is_amd else MAX_SHARED)
    if is_amd:
        assert ("v_mfma" in built.asm["amdgcn"]) == (kernel == "few_tokens")
        return
    ptx = built.asm["ptx"]
    is_hqq = isinstance(scheme, int)
    # Sums of eight codebooks of 32 inputs take all registers there are. For 64 tokens and 3 bits Triton 3.9 spills 32
    # bytes on sm_89 in float16, and 56 on sm_90 in bfloat16.
    is_full = is_hqq and scheme == 3 and n_tokens == 64
    assert spilled <= (128 if scheme == EIGHT_BY_EIGHT else 56 if is_full else 0)
    # Codes and entries come in vectors of 8 or 16 bytes, straight to registers or ahead of time to shared memory.
    assert re.search(r"ld\.global[.\w]*\.v[24]\.b32|cp\.async\.c[ag]\.shared\.global .*, 0x(8|10)\b", ptx)
    if kernel == "dequantize":
        assert re.search(r"st\.global\.v4\.b32", ptx)
        assert not re.search(r"st\.global\.b", ptx)
    if kernel == "few_tokens":
        assert "mma.sync" in ptx or "wgmma" in ptx
    if not is_hqq and kernel != "few_tokens":
        # A large codebook is read past level 1, a small one through it.
        is_large = scheme in (ONE_BY_SIXTEEN, EIGHT_BY_EIGHT)
        assert ("ld.global.cg.v4.b32" in ptx) == is_large
        assert ".cg" not in ptx or is_large
    if kernel == "one_token":
        assert "mma" not in ptx
        assert "ld.local" not in ptx


FORMS = [
    *((4, 1, form) for form in hqq_gpu.TOKEN_FORMS),
    *((3, 1, form) for form in hqq_gpu.TOKEN_FORMS[1:]),
    *((4, n_tokens, form) for n_tokens in (16, 64) for form in hqq_gpu.dot_forms(n_tokens)),
    *((TWO_BY_EIGHT, 1, form) for form in aqlm_gpu.TOKEN_FORMS),
    *((TWO_BY_EIGHT, n_tokens, form) for n_tokens in (16, 64) for form in aqlm_gpu.dot_forms(n_tokens)),
]


@needs_triton
@pytest.mark.usefixtures("triton_on_cpu")
@pytest.mark.parametrize(("scheme", "n_tokens", "form"), FORMS, ids=str)
def test_the_forms_that_are_tried_compile_and_fit_a_gpu_that_is_small(scheme, n_tokens, form, in_form, monkeypatch):
    kernel = "one_token" if n_tokens == 1 else "few_tokens"
    with in_form(form):
        built, spilled = compiled(scheme, kernel, "sm_89", torch.float16, n_tokens, monkeypatch)
    assert built.metadata.shared <= MAX_SHARED
    assert built.metadata.num_warps == form.warps
    assert not spilled


@needs_triton
@pytest.mark.usefixtures("triton_on_cpu")
@pytest.mark.parametrize(("kernel", "n_tokens"), [("one_token", 1), ("few_tokens", 16), ("few_tokens", 64)])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("scheme", [4, 3, TWO_BY_EIGHT], ids=str)
def test_a_product_in_parts_compiles_for_gpus_and_its_last_program_adds_them_up(
    scheme, target, kernel, n_tokens, monkeypatch
):
    monkeypatch.setattr(gpu, "splits", lambda *_: 4)
    is_amd = target.startswith("gfx")
    monkeypatch.setattr(gpu, "has_little_shared_memory", lambda: is_amd)
    built, spilled = compiled(scheme, kernel, target, torch.float16, n_tokens, monkeypatch)
    if is_amd:
        assert re.search(r"global_atomic_add", built.asm["amdgcn"])
        return
    ptx = built.asm["ptx"]
    before, after = ptx.split("atom.")
    # All threads' parts are written before one thread tells it to all of the GPU; what others wrote is read after it.
    assert re.match(r"(global\.gpu\.acq_rel|acq_rel\.gpu\.global)\.add\.[us]32", after)
    assert "st.global" in before
    assert "bar.sync" in before[before.rindex("st.global") :]
    assert "ld.volatile.global" in after
    assert "ld.volatile.global" not in before
    assert not spilled
