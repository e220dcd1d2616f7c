"""Builds the library of the CPU backend; everything else is declared in setup.cfg.

It is a plain shared library, loaded with ctypes: no Python or PyTorch headers, so that one build serves every version of both.
Where there is no compiler, the package installs without it.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("torch-ext/hf_pcdvq_kernels/cpu/csrc")
# Results must not depend on whether a compiler fuses multiplications and additions.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
# Nothing of the C++ runtime is used.
FLAGS += ["-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics", "-Wno-psabi"]
# GCC would load the activations of the next step ahead of time, for which registers do not suffice. Clang does not know the flag.
GCC_FLAGS = ["-fno-predictive-commoning"]


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        """Without the tag of a Python version, on every platform."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """No initialization function: this is not a module."""
        return ext.export_symbols

    def build_extension(self, ext: Extension) -> None:
        try:
            ext.extra_compile_args += [flag for flag in GCC_FLAGS if self.accepts(flag)]
            super().build_extension(ext)
        except Exception as error:
            print(
                f"hf_pcdvq_kernels: no CPU kernels, because compiling them failed ({error}); products on a CPU run in PyTorch, "
                "which is slow. With a C++17 compiler (g++ or clang), install again.",
                file=sys.stderr,
            )

    def accepts(self, flag: str) -> bool:
        """Whether the compiler knows a flag."""
        command = [*self.compiler.compiler_so, "-Werror", flag, "-x", "c++", "-fsyntax-only", os.devnull]
        return subprocess.run(command, capture_output=True).returncode == 0


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(
    ext_modules=[
        Extension(
            "hf_pcdvq_kernels.cpu.libhfp",
            sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            language="c++",
            extra_compile_args=FLAGS,
            extra_link_args=["-Wl,--as-needed"] if sys.platform == "linux" else [],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
