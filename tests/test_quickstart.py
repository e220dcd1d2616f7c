"""The quick start's script on a tiny model: what a newcomer sees, where there is no terminal."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "scripts/quickstart.py"


def test_it_says_what_it_does_and_what_to_type_next(tiny_model_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the river rises in a mountain and falls slowly down to the sea. " * 40)
    command = [sys.executable, SCRIPT, "--model", tiny_model_dir, "--fast", "--context", "64", "--text", text]
    done = subprocess.run(
        [*command, "--dataset", text, "--out", "made"],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "40"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line[:5] for line in lines if line.startswith("[")] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert "it/s]" not in done.stderr
    for row in ("safetensors files", "perplexity", "tokens per second"):
        (found,) = [line for line in lines if line.startswith(f"│ {row}")]
        assert len([cell for cell in found.split("│") if cell.strip()]) == 3  # name, original, packed
    assert any(line.startswith("The original writes:") for line in lines)
    assert any(line.startswith("The packed model writes:") for line in lines)
    packed = f"made/{tiny_model_dir.name}-pcdvq-2.25"
    for name in ("generate", "quantize", "push"):
        assert any(f"hf-pcdvq {name} " in line for line in lines)
    assert any(packed in line and " generate " in line for line in lines) and (tmp_path / packed).is_dir()
