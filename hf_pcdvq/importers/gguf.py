"""From a GGUF file to an ordinary saved model, which can then be quantized like any other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
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
    # Without dequantize=True the weights may remain in GGUF blocks, which save_pretrained refuses.
    options = {"quantization_config": GgufConfig(dequantize=True), "dtype": dtype, "revision": revision}
    with _parsed_once():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, **options)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Have Transformers parse a file once. It does so for the tokenizer, the config and the weights, and makes the table of all
    names anew for every module, which takes longer than to decode the weights of a small model."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files are read with the package gguf, which is missing: pip install gguf") from error
    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, made in kept.items():
            setattr(gguf, name, cache(made))
        yield
    finally:
        for name, made in kept.items():
            setattr(gguf, name, made)
