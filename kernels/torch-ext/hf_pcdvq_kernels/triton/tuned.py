"""Launch configs measured on a device: the file that holds them, and the choice of one for a product.

One file per device model, `<user's cache folder>/hf_pcdvq/<device>.json`, written by `tuning.py` and read once per
process. Without it, the defaults of `launch_config.py` apply.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import triton

from . import launch_config
from .launch_config import LaunchConfig, Shape

FORMAT = 2  # increased whenever a change to the kernels invalidates old measurements


@dataclass(frozen=True)
class TunedConfig:
    """The fastest launch config of a product."""

    config: LaunchConfig
    seconds: float
    default_seconds: float  # of the default config


def choose(shape: Shape, device: torch.device) -> LaunchConfig:
    """The tuned config for a product on a device, or else the default one."""
    measured = load(device).get(shape)
    return launch_config.default(shape, launch_config.processors(device)) if measured is None else measured.config


@cache
def load(device: torch.device) -> Mapping[Shape, TunedConfig]:
    """The tuned configs for this device model; empty, with a warning, if the file cannot be used."""
    file = file_of(device)
    if not file.is_file():
        return {}
    try:
        return read(file, launch_config.processors(device))
    except (OSError, ValueError) as error:
        warnings.warn(
            f"hf_pcdvq ignores the measured launch configs in {file}: {error}. Delete it, or measure again with "
            "`hf-pcdvq tune`",
            stacklevel=2,
        )
        return {}


def file_of(device: torch.device) -> Path:
    """The path of the file with the configs measured on this device model."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "hf_pcdvq" / f"{re.sub(r'[^A-Za-z0-9]+', '-', device_name(device)).strip('-')}.json"


def device_name(device: torch.device) -> str:
    """`NVIDIA H200` and the like; `cpu` for Triton's interpreter."""
    return "cpu" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)


def read(file: Path, processors: int) -> dict[Shape, TunedConfig]:
    """The configs in a file.

    Raises:
        ValueError: it is damaged, from another format or Triton version, or has an unsupported config.
    """
    content = json.loads(file.read_text(encoding="utf-8"))  # raises a ValueError
    try:
        versions = content["format"], content["triton"]
        if versions != (FORMAT, triton.__version__):
            raise ValueError(
                f"it has format {versions[0]} and Triton {versions[1]}, expected {FORMAT} and {triton.__version__}"
            )
        rows = [(Shape(**row["shape"]), LaunchConfig(**row["config"]), row) for row in content["products"]]
        found = {shape: TunedConfig(made, row["seconds"], row["default_seconds"]) for shape, made, row in rows}
    except (KeyError, TypeError) as error:
        raise ValueError(f"its structure is not as expected ({type(error).__name__}: {error})") from None
    for shape, measured in found.items():
        try:
            known = {*launch_config.candidates(shape), launch_config.default(shape, processors)}
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"no kernel supports {shape}") from None
        if measured.config not in known:
            raise ValueError(f"{measured.config} is not a launch config for {shape}")
    return found


def write(file: Path, device: str, measured: Mapping[Shape, TunedConfig]) -> None:
    """Write the file atomically; later products in this process use it."""
    products = [
        {
            "shape": asdict(shape),
            "config": asdict(found.config),
            "seconds": found.seconds,
            "default_seconds": found.default_seconds,
        }
        for shape, found in measured.items()
    ]
    content = {"format": FORMAT, "triton": triton.__version__, "device": device, "products": products}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
    load.cache_clear()
