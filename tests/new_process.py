"""Loads packed models in a new process, as users do."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

PROGRAM = """
import sys, torch, hf_pcdvq
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        torch.save(model(torch.load(f"{folder}/ids.pt")).logits, f"{folder}/logits.pt")
"""


def reloaded_logits(folders: Iterable[Path], ids: torch.Tensor) -> list[torch.Tensor]:
    """The logits of the model in each folder for token ids `[1, n]`. One process loads them all: startup is slow."""
    folders = list(folders)
    for folder in folders:
        torch.save(ids, folder / "ids.pt")
    subprocess.run([sys.executable, "-c", PROGRAM, *folders], check=True)
    return [torch.load(folder / "logits.pt") for folder in folders]
