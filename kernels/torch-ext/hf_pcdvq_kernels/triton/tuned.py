"""Launch configs measured on a device: the files that hold them, and the choice of one for a product.

Those that come with this package, in `configs/`, hold the layers of common models: one file for all devices of the same compute
capability and number of multiprocessors, such as the H100 SXM and the H200. What `tuning.py` measures on the user's device goes to
`<user's cache folder>/hf_pcdvq/<device>.json` and takes precedence. Both are read once per process; the
defaults of `launch_config.py` apply to all other products.
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
SHIPPED = Path(__file__).with_name("configs")


@dataclass(frozen=True)
class TunedConfig:
    """The fastest launch config of a product."""

    config: LaunchConfig
    seconds: float
    default_seconds: float  # of the default config


def choose(shape: Shape, device: torch.device) -> LaunchConfig:
    """The tuned config for a product on a device, or else the default one."""
    tuned = load(device).get(shape)
    return launch_config.default(shape, launch_config.processors(device)) if tuned is None else tuned.config


@cache
def load(device: torch.device) -> Mapping[Shape, TunedConfig]:
    """The tuned configs for this device model: those that come with the package, and the user's."""
    # Another version of Triton may have another fastest config, but hardly one that is slower than the default.
    return {**_usable(SHIPPED / f"{kind_of(device)}.json", device, any_triton=True), **measured(device)}


@cache
def measured(device: torch.device) -> Mapping[Shape, TunedConfig]:
    """The configs that the user has measured."""
    return _usable(file_of(device), device)


def _usable(file: Path, device: torch.device, any_triton: bool = False) -> dict[Shape, TunedConfig]:
    """The configs in a file; none if there is no file, or, with a warning, if it cannot be used."""
    if not file.is_file():
        return {}
    try:
        return read(file, launch_config.processors(device), any_triton)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"hf_pcdvq ignores the measured launch configs in {file}: {error}. Delete it, or measure again with "
            "`hf-pcdvq tune`",
            stacklevel=2,
        )
        return {}


def forget() -> None:
    """Read the files again when a config is next asked for."""
    load.cache_clear()
    measured.cache_clear()


def file_of(device: torch.device) -> Path:
    """The path of the file with the configs that the user has measured on this device model."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "hf_pcdvq" / f"{re.sub(r'[^A-Za-z0-9]+', '-', device_name(device)).strip('-')}.json"


def kind_of(device: torch.device) -> str:
    """What devices share that run kernels alike: `cuda-90-132` is compute capability 9.0 with 132 multiprocessors."""
    processors = launch_config.processors(device)
    if device.type != "cuda":
        return f"{device.type}-{processors}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{'cuda' if torch.version.hip is None else 'hip'}-{major}{minor}-{processors}"


def device_name(device: torch.device) -> str:
    """`NVIDIA H200` and the like; `cpu` for Triton's interpreter."""
    return "cpu" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)


def read(file: Path, processors: int, any_triton: bool = False) -> dict[Shape, TunedConfig]:
    """The configs in a file.

    Args:
        file: written by `write`.
        processors: of the device, see `launch_config.processors`.
        any_triton: accept measurements with another version of Triton.

    Raises:
        ValueError: it is damaged, from another format or Triton version, or has an unsupported config.
    """
    content = json.loads(file.read_text(encoding="utf-8"))  # raises a ValueError
    try:
        versions = content["format"], triton.__version__ if any_triton else content["triton"]
        if versions != (FORMAT, triton.__version__):
            raise ValueError(
                f"it has format {versions[0]} and Triton {versions[1]}, expected {FORMAT} and {triton.__version__}"
            )
        rows = [(Shape(**row["shape"]), LaunchConfig(**row["config"]), row) for row in content["products"]]
        found = {shape: TunedConfig(made, row["seconds"], row["default_seconds"]) for shape, made, row in rows}
    except (KeyError, TypeError) as error:
        raise ValueError(f"its structure is not as expected ({type(error).__name__}: {error})") from None
    for shape, tuned in found.items():
        try:
            known = {*launch_config.candidates(shape), launch_config.default(shape, processors)}
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"no kernel supports {shape}") from None
        if tuned.config not in known:
            raise ValueError(f"{tuned.config} is not a launch config for {shape}")
    return found


def write(file: Path, device: str, found: Mapping[Shape, TunedConfig]) -> None:
    """Write the file atomically; later products in this process use it."""
    products = [
        {
            "shape": asdict(shape),
            "config": asdict(tuned.config),
            "seconds": tuned.seconds,
            "default_seconds": tuned.default_seconds,
        }
        for shape, tuned in found.items()
    ]
    content = {"format": FORMAT, "triton": triton.__version__, "device": device, "products": products}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
    forget()
