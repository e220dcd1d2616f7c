"""Loading the library of the CPU backend, and doing without it. Each case has a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hf_pcdvq_kernels.cpu import library

PACKAGES = Path(library.__file__).parents[2]
PRODUCT = """
import hf_pcdvq_kernels as ops, torch
from pathlib import Path
from hf_pcdvq_kernels import random_weights
from hf_pcdvq_kernels.cpu import library
packed = random_weights.random_packed("pcdvq-2.25", 8, 64)
x = torch.ones(1, 64)
"""
needs_library = pytest.mark.skipif(
    not isinstance(library.load(), library.Library), reason=f"no CPU kernels: {library.load()}"
)


def run(program):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGES), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-c", PRODUCT + program], capture_output=True, text=True, env=environment, check=True
    )


def test_without_the_library_one_line_says_what_is_missing_and_pytorch_computes():
    result = run("""
library.PATH = Path("/nowhere/libhfp.so")
for _ in range(3):
    print(ops.matmul("pcdvq", x, packed).isfinite().all().item())
ops.set_backend("cpu")
try:
    ops.matmul("pcdvq", x, packed)
except RuntimeError as error:
    print(error)
""")
    assert result.stdout.splitlines()[:3] == ["True"] * 3
    assert "set to 'cpu', but the CPU kernels are missing: libhfp.so was not built" in result.stdout
    warnings = [line for line in result.stderr.splitlines() if "UserWarning" in line]
    assert len(warnings) == 1
    assert "decodes with PyTorch, which is slow, because the CPU kernels are missing" in warnings[0]
    assert "if a C++17 compiler is found" in warnings[0]


def test_a_file_that_is_no_library_is_named(tmp_path):
    (tmp_path / "libhfp.so").write_bytes(b"not a library")
    result = run(f"""
library.PATH = Path({str(tmp_path)!r}) / "libhfp.so"
print(ops.matmul("pcdvq", x, packed).isfinite().all().item())
""")
    assert result.stdout.strip() == "True"
    assert f"{tmp_path}/libhfp.so" in result.stderr


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_threads_are_those_of_pytorch():
    """No thread is added beyond those that PyTorch uses, even if another package has loaded an OpenMP runtime of its own."""
    result = run("""
import os
try:
    import sklearn.metrics
except ImportError:
    pass
torch.set_num_threads(3)
big = random_weights.random_packed("pcdvq-2.25", 4096, 512)
torch.randn(512, 512) @ torch.randn(512, 512)
torch.randn(1 << 20).exp()
before = len(os.listdir("/proc/self/task"))
for _ in range(5):
    ops.matmul("pcdvq", torch.ones(2, 512), big)
print(library.load().has_threads, len(os.listdir("/proc/self/task")) - before)
""")
    assert result.stdout.splitlines() == ["True 0"]
