"""benchmarks/mixed_bits.py on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/mixed_bits.py"


def tokens(seed, count):
    return torch.randint(2, 258, (count, 24), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def run(tiny_model_dir, tmp_path):
    """Runs the script, with further arguments, for 2.35 bits."""
    torch.save(tokens(0, 9), tmp_path / "calibration.pt")
    torch.save(tokens(1, 4), tmp_path / "evaluation.pt")

    def run(*arguments):
        command = [sys.executable, SCRIPT, tiny_model_dir, "--out", tmp_path / "mixed.json", "--device", "cpu"]
        command += ["--work-dir", tmp_path / "parts", "--setting", "pcdvq-2.0", "--target-bits", "2.35"]
        command += ["--calibration", tmp_path / "calibration.pt", "--evaluation", tmp_path / "evaluation.pt"]
        return subprocess.run(list(map(str, [*command, *arguments])), capture_output=True, text=True)

    return run


def test_rows_are_kept_for_the_same_inputs_only(run, tmp_path):
    done = run()
    assert done.returncode == 0, done.stderr
    file = tmp_path / "mixed.json"
    first = json.loads(file.read_text())
    assert [row["row"] for row in first["rows"]] == ["uniform pcdvq-2.0", "uniform pcdvq-2.25", "auto 2.35"]
    assert first["rows"][2]["bits_counted"] <= 2.35
    done = run()
    assert done.returncode == 0 and json.loads(file.read_text()) == first  # with the seconds of the first time

    done = run("--blocks", "1", "--windows", "3")
    assert done.returncode == 2 and json.loads(file.read_text()) == first
    assert "differs in the model's weights and the model's config and the evaluation data" in " ".join(
        done.stderr.split()
    )
