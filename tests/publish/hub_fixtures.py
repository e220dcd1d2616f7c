"""A packed model with everything that a push can send, and the stand-in for the Hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
from fake_hub import WRITE_TOKEN, FakeHub
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_pcdvq import Calibration, PcdvqConfig, quantize_model
from hf_pcdvq.evaluation.metrics import evaluate, token_windows
from hf_pcdvq.evaluation.record import EvaluationRecord, NoiseFloor, TaskScore, count_bits, hash_tokens
from hf_pcdvq.files.records import device_name, package_versions

TEXT = "the river rises in a mountain and falls slowly down to the sea. " * 40


@pytest.fixture(scope="session")
def calibrated(tiny_model_dir):
    """A calibrated model in memory, with its tokenizer. Shared by all tests: do not modify it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    config = PcdvqConfig(calibration=Calibration(samples=4, length=32, holdout=2))
    return quantize_model(model, tokenizer, config, [TEXT], progress=False), tokenizer


@pytest.fixture(scope="session")
def evaluated_once(calibrated, tiny_model_dir, tmp_path_factory) -> Path:
    """The calibrated model in several shards, with report and evaluation. Shared by all tests: do not modify it."""
    folder = tmp_path_factory.mktemp("push") / "packed"
    model, tokenizer = calibrated
    model.save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    model.hf_quantizer.report.write(folder)
    original = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    windows = token_windows(tokenizer, TEXT, 64, 8)
    bits_per_packed_weight, bits_per_parameter = count_bits(str(folder))
    EvaluationRecord(
        original="tiny",
        packed="packed",
        text="texts/river.txt",
        tokens=hash_tokens(windows),
        metrics=evaluate(original, model, windows, progress=False),
        noise_floor=NoiseFloor("float32", evaluate(original, original, windows, progress=False)),
        tasks=[TaskScore("piqa", "acc", 0.71234, 0.01, 0.65432, None, 200)],
        bits_per_packed_weight=bits_per_packed_weight,
        bits_per_parameter=bits_per_parameter,
        device=device_name(model.device),
        versions={**package_versions(), "lm_eval": "0.4.99"},
        command="hf-pcdvq eval tiny packed --text texts/river.txt",
    ).write(folder)
    return folder


@pytest.fixture
def packed(evaluated_once, tmp_path) -> Path:
    """A copy of the model that the test may modify."""
    return shutil.copytree(evaluated_once, tmp_path / "packed")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, which this process contacts instead of the Hub, without Xet or delays between retries."""
    with FakeHub(lfs=True) as fake:
        template = fake.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", fake.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        yield fake


@pytest.fixture
def run_with(tmp_path):
    """Runs a program in a new process with this stand-in as the Hub and an empty cache; returns its output."""

    def run(hub: FakeHub, program: str, *arguments: object) -> str:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / f"home-{len(hub.requests)}"),
            "HF_TOKEN": WRITE_TOKEN,
            "HF_HUB_DISABLE_XET": "1" if hub.lfs else "0",
        }
        command = [sys.executable, "-c", program, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
