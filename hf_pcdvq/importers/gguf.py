"""From a GGUF file to an ordinary saved model, which can then be quantized like any other."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def dense_from_gguf(
    folder: str | Path,
    gguf_file: str,
    out: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    revision: str | None = None,
) -> None:
    """Decode a GGUF file with Transformers and save model and tokenizer as an ordinary dense folder.

    The model is only as precise as the GGUF file: from a 4-bit file come 4-bit weights, stored in `dtype`.

    Args:
        folder: the folder that contains the file, or a repository on the Hub.
        gguf_file: name of the file in it.
        out: folder to write.
        dtype: dtype of the saved weights.
        revision: branch, tag or commit of a repository on the Hub.

    Raises:
        OSError: the folder, repository or file does not exist.
        ValueError: Transformers does not support the architecture of the file.
        ImportError: the package `gguf`, which reads the file, is not installed.
    """
    source = str(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file, revision=revision)
    # Without dequantize=True the weights may remain in GGUF blocks, which save_pretrained refuses.
    options = {"quantization_config": GgufConfig(dequantize=True), "dtype": dtype, "revision": revision}
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, **options)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
