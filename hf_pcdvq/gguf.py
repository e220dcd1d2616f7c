"""From a GGUF file to an ordinary model folder, which can then be quantized like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def dense_from_gguf(
    folder: str | Path,
    gguf_file: str,
    out: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    revision: str | None = None,
) -> None:
    """Decode a GGUF file with Transformers and save model and tokenizer as an ordinary dense folder.

    The model comes out in whatever precision the GGUF file has: from a 4-bit file come 4-bit weights, in `dtype`.

    Args:
        folder: the folder that holds the file, or a repository on the Hub.
        gguf_file: name of the file in it.
        out: where to save.
        dtype: dtype of the saved weights.
        revision: branch, tag or commit of a repository on the Hub.

    Raises:
        OSError: there is no such folder, repository or file.
        ValueError: Transformers does not know the architecture of the file.
        ImportError: the package `gguf`, which reads the file, is not installed.
    """
    source = str(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file, revision=revision)
    loaded = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf_file, dtype=dtype, revision=revision, **_decoded()
    )
    _without_quantizer(loaded).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _decoded() -> dict[str, Any]:
    """Newer versions of Transformers keep the weights in their GGUF blocks where they have a kernel, unless told not to."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _without_quantizer(loaded: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that knows nothing of GGUF.

    Transformers keeps the `gguf` quantizer on a model it has decoded, and `save_pretrained` then refuses to save it.
    """
    config = type(loaded.config).from_dict(loaded.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model
