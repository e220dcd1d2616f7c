"""What the result of a calibrated run depends on, as hashes by name, so that one run is never resumed as another."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..files.contents import byte_view, model_hash, tensor_hash
from ..files.records import package_versions
from ..processes import Processes

if TYPE_CHECKING:
    from ..config import PackedConfig

Identity = dict[str, str]  # a hash, or the value itself, by the name of what it is of

# Fields of a calibration that finished blocks do not depend on: the name of the text, whose tokens are hashed, and how
# many further windows the result is compared on.
_IRRELEVANT = ("dataset", "holdout")


def model_identity(model: nn.Module, weights: str | None = None) -> Identity:
    """Of a dense model: its weights, its class and its config.

    Args:
        weights: the hash of its weights, see `files.contents.model_hash`; None takes them from memory.
    """
    return {"the model's weights": weights or _weights_digest(model), **_kind(model)}


def _kind(model: nn.Module) -> Identity:
    """Of a model without its weights."""
    return {
        "the model's config": _digest([type(model).__name__, _model_config(model)]),
        "the versions of packages": json.dumps(package_versions()),
    }


def _weights_digest(model: nn.Module) -> str:
    state = model.state_dict()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # xxhash computes without the GIL
        return model_hash(dict(zip(state, pool.map(tensor_hash, state.values()))))


def run_identity(
    model: Identity,
    names: list[str],
    config: PackedConfig,
    windows: Tensor | None,
    device: torch.device,
    at_once: int = 0,
    processes: int = 1,
) -> Identity:
    """Of a run that quantizes the modules `names` of a model.

    Args:
        windows: what it is calibrated on, int64 `[n, L]`; None if it rounds.
        device: where it computes. Each kind rounds in its own way.
        at_once: how many of them go through a block and into sums at once, see `window_batches`.
        processes: how many share the run. On a CPU the result does not depend on it, see `layers.part_count`.
    """
    settings, tokens = config.to_dict(), hashlib.sha256()
    if windows is not None:
        settings["calibration"] = {
            name: value for name, value in config.calibration.to_dict().items() if name not in _IRRELEVANT
        }
        update_with_tensor(tokens, "windows", windows)
    return {
        **model,
        "the settings": _digest([settings, names]),
        "the calibration data": tokens.hexdigest(),
        "the kind of device": device.type,
        "the number of windows at once (batch_tokens, or the device)": str(at_once),
        "the number of processes": "any" if windows is None or device.type == "cpu" else str(processes),
    }


def differences(found: Any, expected: Identity) -> str:
    """The names of what differs, in words; everything if `found` is no identity."""
    known = found if isinstance(found, dict) else {}
    return " and ".join(name for name, value in expected.items() if known.get(name) != value) or "what it records"


def agree(
    model: nn.Module,
    names: list[str],
    config: PackedConfig,
    device: torch.device,
    processes: Processes,
    **options: Any,
) -> None:
    """Check that processes are about to do the same, as far as that is known without reading weights or text.

    Args:
        names: the modules to quantize.
        options: further ones that must be the same.

    Raises:
        ValueError: they are not; the message names what differs.
    """
    settings = config.to_dict()
    if config.calibration is not None:  # the first process alone reads the text, whatever the others call it
        settings["calibration"] = {**config.calibration.to_dict(), "dataset": None}
    found = {**_kind(model), "the settings": _digest([settings, names]), "the kind of device": device.type}
    agreed({**found, **{name: str(value) for name, value in options.items()}}, processes)


def agreed(identity: Identity, processes: Processes) -> Identity:
    """What must be the same in all processes.

    Raises:
        ValueError: it is not; the message names what differs.
    """
    for rank, (_, found) in enumerate(processes.gather({}, identity)):
        if found != identity:
            raise ValueError(
                f"process {processes.rank} and process {rank} were started differently: they differ in "
                f"{differences(found, identity)}"
            )
    return identity


def update_with_tensor(sha: Any, name: str, tensor: Tensor) -> None:
    """Add name, dtype, shape and contents of a tensor to a hash."""
    sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    sha.update(byte_view(tensor).numpy())


def _model_config(model: nn.Module) -> dict[str, Any]:
    """The model's config without what says where it was read from."""
    return _without(model.config.to_dict(), {"_name_or_path", "_commit_hash", "quantization_config"})


def _without(fields: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {
        name: _without(value, names) if isinstance(value, dict) else value
        for name, value in fields.items()
        if name not in names
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
