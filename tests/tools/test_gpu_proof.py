"""The proof on a GPU, rehearsed: every step runs on tiny shapes, so that a typing error costs no time there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

PROOF = Path(__file__).resolve().parents[2] / "tools/gpu_proof"


def run(*arguments):
    return subprocess.run([sys.executable, PROOF, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    out = tmp_path_factory.mktemp("proof")
    done = run("--out", out, "--dry-run")
    assert done.returncode == 0, done.stdout
    return out


def test_every_step_passes_and_leaves_its_results(rehearsed):
    ended = {name: outcome["ended"] for name, outcome in json.loads((rehearsed / "proof.json").read_text()).items()}
    assert len(ended) == 9 and set(ended.values()) == {"passed"}
    files = {"products.json", "kernels-one-token.json", "kernels.json", "generate.json", "blocks.json"}
    assert files | {"features.json", "log.txt"} <= {file.name for file in rehearsed.iterdir()}
    assert all(row["passed"] for row in json.loads((rehearsed / "products.json").read_text()))


def test_a_step_that_fails_is_recorded_and_tried_again(tmp_path):
    """Its output is kept, the steps after it run, and only it runs again."""
    (tmp_path / "kernels-one-token.json").write_text("not results")
    steps = ["--steps", "bench one token", "tune"]
    done = run("--out", tmp_path, "--dry-run", *steps)
    assert done.returncode == 1
    ended = {name: outcome["ended"] for name, outcome in json.loads((tmp_path / "proof.json").read_text()).items()}
    assert ended == {"bench one token": "failed", "tune": "passed"}
    assert "does not hold results of bench_kernels.py" in (tmp_path / "log.txt").read_text()
    (tmp_path / "kernels-one-token.json").unlink()
    again = run("--out", tmp_path, "--dry-run", "--resume", *steps)
    assert again.returncode == 0
    assert [line for line in again.stdout.splitlines() if line.startswith("== ")][0] == "== bench one token"
    assert "== tune" not in again.stdout
