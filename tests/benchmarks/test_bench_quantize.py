"""benchmarks/bench_quantize.py on tiny models: what its file says, not the time and the memory."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/bench_quantize.py"


def run(tmp_path, *options):
    """What a part has written, after it has written into a file that has another part already."""
    out = tmp_path / "quantize.json"
    out.write_text('{"other": 1}')
    command = [sys.executable, SCRIPT, *options, "--work", tmp_path / "work", "--out", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    assert content.pop("other") == 1
    return content


def test_one_process_is_timed_and_compared_with_itself(tiny_model_dir, tmp_path):
    (tmp_path / "text.txt").write_text("the river rises in a mountain and falls slowly down to the sea. " * 40)
    options = ["--model", tiny_model_dir, "--dataset", tmp_path / "text.txt", "--blocks", 1, "--processes", 1]
    options += ["--samples", 8, "--length", 32, "--rounds", 1, "--setting", "pcdvq-2.0"]
    row = run(tmp_path, "processes", *options)["processes"]
    assert row["times as fast"] == {"1": 1.0} and row["the same files"]
    assert row["seconds"]["1"]["whole"] > row["seconds"]["1"]["blocks"] > 0


def test_the_memory_of_a_checkpoint_that_is_deleted_afterwards(tmp_path):
    row = run(tmp_path, "memory", "--smoke")["memory"]
    assert row["setting"] == "pcdvq-2.0" and row["seconds"] > 0
    assert row["packed bytes"] < row["dense bytes"] < row["peak resident bytes"]
    assert not any((tmp_path / "work").iterdir())


def test_texts_and_models_are_asked_for(tmp_path):
    command = [sys.executable, SCRIPT, "processes", "--model", "m", "--work", tmp_path / "work"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 2 and "needs --model and --dataset" in done.stderr
