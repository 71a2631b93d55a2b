"""The compiled CPU kernels; all else about the package is in ``pyproject.toml``.

The library is plain C that Python loads with ctypes, and optional: without a C compiler the package installs all
the same, and computes in plain torch. A wheel without the library is tagged as one for every platform.
"""

import os
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PACKAGE = Path("kernels", "quantlayers_kernels")
CSRC = PACKAGE / "csrc"
# The library says which interface it was built for, and Python refuses it when its own is another.
INTERFACE = PACKAGE / "interface.py"
interface_number = runpy.run_path(str(INTERFACE))["INTERFACE"]


class BuildAtOnce(build_ext):
    """Compiles the sources side by side: one for each instruction set, a minute or more each."""

    def build_extension(self, ext: Extension) -> None:
        compile_in_turn = self.compiler.compile

        def compile_at_once(sources: list[str], **options: object) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                made = threads.map(lambda source: compile_in_turn([source], **options), sources)
                return [file for files in made for file in files]

        self.compiler.compile = compile_at_once
        super().build_extension(ext)


class BuildWheel(bdist_wheel):
    """Tags the wheel by what was built; setuptools does it by what was to be built."""

    def run(self) -> None:
        self.run_command("build_ext")
        if not any(Path(built).exists() for built in self.get_finalized_command("build_ext").get_outputs()):
            self.warn("the compiled CPU kernels were not built: no working C compiler was found")
            self.root_is_pure, self.py_limited_api = True, False
        super().run()


setup(
    cmdclass={"bdist_wheel": BuildWheel, "build_ext": BuildAtOnce},
    ext_modules=[
        Extension(
            "quantlayers_kernels._native",
            sources=sorted(str(path) for path in CSRC.glob("*.c")),
            depends=[str(INTERFACE), *sorted(str(path) for path in CSRC.glob("*.h"))],
            define_macros=[("QL_INTERFACE", f"{interface_number}u")],
            extra_compile_args=["-std=gnu11", "-O3", "-Wno-psabi"],
            py_limited_api=True,
            optional=True,
        )
    ],
    # It has no Python in it, so one wheel serves every version.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
