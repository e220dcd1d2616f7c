"""benchmarks/recovery.py on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from hf_pcdvq import PcdvqConfig

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/recovery.py"


def test_every_combination_has_its_curves_and_its_time(tiny_model_dir, tmp_path):
    packed = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=PcdvqConfig(bits=2.0))
    packed.save_pretrained(tmp_path / "packed")
    tokens = torch.randint(2, 258, (12, 24), generator=torch.Generator().manual_seed(0))
    torch.save(tokens[:8], tmp_path / "train.pt")
    torch.save(tokens[8:], tmp_path / "held_out.pt")
    (tmp_path / "text.txt").write_text("the river rises in a mountain and falls slowly down to the sea. " * 10)
    command = [sys.executable, SCRIPT, tmp_path / "packed", tiny_model_dir, "--out", tmp_path / "recovery.json"]
    command += ["--train", tmp_path / "train.pt", "--held-out", tmp_path / "held_out.pt", "--device", "cpu"]
    command += ["--learning-rate", "0", "0.01", "--steps", "4", "--batch", "1", "2", "--evaluations", "2"]
    command += ["--text", tmp_path / "text.txt", "--windows", "2", "--context", "64", "--save", tmp_path / "saved"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "recovery.json").read_text())["rows"]
    settings = [(row["settings"]["learning_rate"], row["settings"]["batch"]) for row in rows]
    assert settings == [(0, 1), (0, 2), (0.01, 1), (0.01, 2)]
    for row in rows:
        assert len(row["losses"]) == 4 and row["evaluations"][0] == [0, row["before"]["kl_mean"]]
        assert row["seconds_per_step"] > 0 and row["evaluation"]["context_length"] == 64
        improved = row["after"]["kl_mean"] < row["before"]["kl_mean"]
        assert improved == (row["settings"]["learning_rate"] > 0)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").hf_quantizer.pre_quantized
