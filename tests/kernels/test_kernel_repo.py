"""The folder for Hugging Face's `kernels`: that library loads it, and the results are those of the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packing import SETTINGS, op_pair, random_packed

pytest.importorskip("kernels", reason="the extra `dev` is not installed")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools/build_kernel_repo.py"
BACKENDS = ("cuda", "rocm", "xpu", "cpu")

# The products of every codec in a new process. An absolute import of the package, instead of a relative one, would
# find the installed package and be noticed.
PRODUCTS = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel

ops = get_local_kernel(Path({repository!r}))
assert not [name for name in sys.modules if name.startswith("hf_pcdvq")], "imported by name"
inputs = torch.load({inputs!r})
products = {{}}
for setting, (x, packed) in inputs.items():
    products[setting] = ops.matmul(ops.family_of(setting).family, x, packed, signs=torch.ones(64))
torch.save((ops.__name__, products), {outputs!r})
"""

# Next to the wheel's package, and twice: the ops of both are available, and each copy has its own backend setting.
TOGETHER = """
from pathlib import Path
import torch
import hf_pcdvq_kernels
from kernels import get_local_kernel

ops = get_local_kernel(Path({repository!r}))
assert ops is get_local_kernel(Path({repository!r})) and ops is not hf_pcdvq_kernels
x, signs = torch.randn(2, 64), torch.ones(64)
assert torch.equal(ops.hadamard(x, signs), hf_pcdvq_kernels.hadamard(x, signs))
assert hasattr(torch.ops.hf_pcdvq_kernels, "ccq_matmul") and hasattr(getattr(torch.ops, ops.__name__), "ccq_matmul")
x.requires_grad_()
ops.hadamard(x, signs).sum().backward()
assert x.grad is not None
ops.set_backend("reference")
assert hf_pcdvq_kernels.get_backend() == "auto"
"""


def build(out: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, "--out", out], capture_output=True, text=True)


def run(program: str, path: str) -> None:
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("kernel") / "repository"
    done = build(out)
    assert done.returncode == 0, done.stderr
    return out


def test_the_source_is_a_valid_project_of_kernel_builder(capfd):
    from kernels._rust import Build

    assert {str(backend).lower() for backend in Build.open(ROOT / "kernels").general.backends} == set(BACKENDS)
    assert "legacy" not in capfd.readouterr().err


def test_every_variant_is_described(repository):
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    assert {path.name for path in repository.iterdir()} == {"build", "README.md", "LICENSE"}
    assert {path.name for path in (repository / "build").iterdir()} == {f"torch-{backend}" for backend in BACKENDS}
    for backend in BACKENDS:
        variant = repository / f"build/torch-{backend}"
        metadata = Metadata.read_from_file(variant / "metadata.json")
        assert (metadata.name.python_name, metadata.version) == ("hf_pcdvq_kernels", 1)
        assert str(metadata.backend.backend_type).lower() == backend
        # The digest of its files is the one that the library itself computes.
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
        assert not list(variant.rglob("__pycache__"))


def test_it_computes_what_the_package_computes(repository, tmp_path, exact_products):
    inputs, outputs = tmp_path / "inputs.pt", tmp_path / "outputs.pt"
    generator = torch.Generator().manual_seed(0)
    given = {
        setting: (torch.randn(3, 192, generator=generator), random_packed(setting, 12, 192)) for setting in SETTINGS
    }
    torch.save(given, inputs)
    run(PRODUCTS.format(repository=str(repository), inputs=str(inputs), outputs=str(outputs)), path="")
    name, products = torch.load(outputs)
    assert name == json.loads((repository / "build/torch-cpu/metadata.json").read_text())["id"]
    for setting, (x, packed) in given.items():
        # Not bit-identical: processes with different numbers of threads sum 192 products in different orders, and some
        # sums are small beside what is added.
        expected = op_pair(setting)[1](x, *packed, signs=torch.ones(64))
        torch.testing.assert_close(products[setting], expected, rtol=1e-4, atol=1e-3)


def test_it_can_be_loaded_beside_the_package(repository):
    run(TOGETHER.format(repository=str(repository)), path=str(ROOT / "kernels/torch-ext"))


def test_only_an_older_build_is_replaced(repository, tmp_path):
    (repository / "README.md").write_text("old")
    assert build(repository).returncode == 0 and "hf_pcdvq_kernels" in (repository / "README.md").read_text()
    (tmp_path / "notes.txt").write_text("mine")
    done = build(tmp_path)
    assert done.returncode == 1 and "holds something else" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    other = tmp_path.parent / "mixed"
    build(other)
    (other / "notes.txt").write_text("mine")
    assert build(other).returncode == 1 and (other / "notes.txt").exists()
