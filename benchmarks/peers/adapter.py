"""Shared by the adapters, each of which quantizes the model in a peer's own environment and saves it decoded.

    python with_PEER.py SOURCE OUT '{"option": value}'

SOURCE holds `model/` (a dense model in one safetensors file), `layers.json` (names of the weights to quantize),
`inputs.safetensors` (per weight the mean square of each input, float32 `[in]`) and `tokens.safetensors` (calibration
windows, int64 `[n, L]`). OUT becomes a dense model folder with the decoded weights and `count.json`: the bytes that the
peer stores for them, the number of weights, and the peer's version. Needs only PyTorch, NumPy and safetensors.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


def arguments() -> tuple[Path, Path, dict]:
    """SOURCE, OUT and the options."""
    source, out, options = sys.argv[1:]
    return Path(source), Path(out), json.loads(options)


def calibration_tokens(source: Path) -> Tensor:
    return load_file(source / "tokens.safetensors")["tokens"]


def each_weight(package: str, quantize: Callable[..., tuple[Tensor, int]]) -> None:
    """Quantize weight by weight.

    Args:
        package: the peer's name on PyPI.
        quantize: takes a weight float32 `[out, in]`, the mean squares of its inputs `[in]` and the options; returns the
            decoded weight, of the same shape, and the number of bytes that are stored for it.
    """
    source, out, options = arguments()
    weights = load_file(source / "model" / "model.safetensors")
    inputs = load_file(source / "inputs.safetensors")
    decoded, nbytes = {}, 0
    for name in json.loads((source / "layers.json").read_text()):
        decoded[name], size = quantize(weights[name].float(), inputs[name], **options)
        nbytes += size
    write(source, out, package, decoded, nbytes)


def write(source: Path, out: Path, package: str, decoded: dict[str, Tensor], nbytes: int) -> None:
    """Save the model with the decoded weights in place of its own.

    Raises:
        ValueError: weights are missing, have the wrong shape, or are almost uncorrelated with the original. Their
            distance to it is not checked: at 2 bits, GPTQ's error feedback leaves it further away than zeros would be.
    """
    with safe_open(source / "model" / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    weights = load_file(source / "model" / "model.safetensors")
    names = json.loads((source / "layers.json").read_text())
    wrong = [name for name in names if name not in decoded or decoded[name].shape != weights[name].shape]
    if wrong:
        raise ValueError(
            f"{package}: {len(wrong)} weights are missing or have the wrong shape; the first is {wrong[0]}"
        )
    for name in names:
        cosine = torch.cosine_similarity(decoded[name].float().flatten(), weights[name].float().flatten(), dim=0)
        if not cosine > 0.25:  # it is about zero for weights in the wrong order
            raise ValueError(f"{package}: {name} was not decoded: its cosine to the original is {cosine:.3g}")
        weights[name] = decoded[name].to(weights[name].dtype).contiguous()
    shutil.copytree(source / "model", out)
    save_file(weights, out / "model.safetensors", metadata)
    count = {"bytes": nbytes, "weights": sum(weights[name].numel() for name in names)}
    count["versions"] = {package: version(package), "torch": torch.__version__}
    (out / "count.json").write_text(json.dumps(count))
