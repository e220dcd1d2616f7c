"""What quantizing a model takes: memory, disk and roughly how long, by arithmetic on its shapes.

Of several processes, the figures are those of the first, which writes; others take as much memory and, for activations, as
much disk, and each reads as much. It is assumed that the work divides evenly, and what they say to each other is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import nn

from .calibration.blocks import find_blocks
from .calibration.data import window_batches
from .calibration.decoder_block import PARTS
from .calibration.inputs import OriginalInputs, recorded_inputs
from .calibration.run import MAX_STAGES
from .calibration.settings import OWN_SHARE, Calibration
from .calibration.shares import share_count, sums_at_once
from .codecs.base import slice_size
from .emulation import is_emulated
from .modules import dense_weights
from .streaming.checkpoint import unit_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .codecs.base import Codec
    from .config import PackedConfig

# Measured on a CPU: libraries and the process itself; bytes per element of a matrix that is rounded, of the weights of a
# group of layers with one input that are calibrated, and of the square of the number of their inputs while they are.
_PROCESS = 700 << 20
_ROUNDED, _CALIBRATED, _SQUARED = 24, 44, 40
# Bytes per element of a large matrix that is rounded, and of the slice of it that is encoded at once.
_ENCODED, _IN_SLICE = 6, 40
_PASSES = 3  # forward passes of a window through a block that is calibrated: original, up to each group, quantized


@dataclass(frozen=True)
class Effort:
    """What quantizing takes, rounded to the nearest codes or calibrated.

    Attributes:
        memory_bytes: of the process, weights and activations included, on the machine and its accelerator together.
        disk_bytes: written at the same time: the result, its finished blocks, and activations.
        read_bytes: read of the dense checkpoint.
        seconds: on this machine, from short measurements; None if they were not asked for.
    """

    memory_bytes: int
    disk_bytes: int
    read_bytes: int
    seconds: float | None


@dataclass(frozen=True)
class _Matrix:
    """A matrix that is packed, or a stack of them: one for each expert."""

    module: str
    group: str  # matrices with one input
    shape: tuple[int, ...]
    codec: Codec
    share: float  # of the tokens that each matrix of a stack sees

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass
class _Unit:
    """A part of the model that is in memory as a whole; `unit_name` says which. In bytes."""

    dense: int = 0
    packed: int = 0


def efforts(
    model: PreTrainedModel,
    names: list[str],
    config: PackedConfig,
    packed_bytes: dict[int, int],
    timed: bool,
    processes: int = 1,
) -> dict[str, Effort]:
    """The effort of rounding and of calibrating with the default number of windows, by these names.

    Args:
        model: dense, on the meta device; it is run on one token.
        names: the modules to pack.
        config: their formats, and the calibration if it has one.
        packed_bytes: of every weight that is packed, by its `id`.
        timed: measure this machine, which takes seconds, to tell how long each takes.
        processes: that share the work, each on a machine or a GPU like this one.

    Raises:
        ValueError: more processes than can share a calibration.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    matrices, units = _matrices(model, names, config), _units(model, packed_bytes)
    blocks = f"{find_blocks(model, names)}."
    inside = [matrix for matrix in matrices if matrix.module.startswith(blocks)]
    outside = [matrix for matrix in matrices if not matrix.module.startswith(blocks)]
    encoding = None
    if timed:
        rates = {codec: _encoding_rate(codec, device) for codec in {matrix.codec for matrix in matrices}}
        encoding = [sum(one.numel / rates[one.codec] for one in some) / processes for some in (inside, outside)]
    rounding = max(
        [_ROUNDED * one.shape[-1] * one.shape[-2] for one in inside]
        # Embeddings and heads are so large that it is slices that count.
        + [min(_ROUNDED * one.numel, _ENCODED * one.numel + _IN_SLICE * slice_size(device)) for one in outside]
    )
    packed, dense = sum(unit.packed for unit in units.values()), sum(unit.dense for unit in units.values())
    largest = max(unit.packed for unit in units.values())
    memory = _PROCESS + largest + rounding
    settings = config.calibration or Calibration()
    share_count(settings.samples, processes)
    return {
        "rounded": Effort(memory, 2 * packed, 2 * dense, None if encoding is None else sum(encoding)),
        "calibrated": _calibrated(model, inside, blocks, rounding, units, settings, device, encoding, processes),
    }


def _calibrated(
    model: PreTrainedModel,
    matrices: list[_Matrix],
    blocks: str,
    rounding: int,
    units: dict[str, _Unit],
    settings: Calibration,
    device: torch.device,
    encoding: list[float] | None,
    processes: int,
) -> Effort:
    """The effort of a calibrated run.

    Args:
        matrices: those inside the blocks; others are rounded.
        blocks: what the names of units inside the blocks begin with.
        rounding: bytes to round a matrix.
        encoding: seconds to encode the matrices inside and outside the blocks.
    """
    upcast = is_emulated(model.dtype, device)
    size = 4 if upcast else model.dtype.itemsize
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    tokens = settings.samples * settings.length
    windows = torch.empty(settings.samples, settings.length, device="meta")
    batch = window_batches(windows, device)[0].numel()
    groups: dict[str, list[_Matrix]] = {}
    for matrix in matrices:
        groups.setdefault(matrix.group, []).append(matrix)
    sums = 4 * (3 if settings.correction == OWN_SHARE else 2)
    work = max(
        max(_working_memory(group, max(_SQUARED, sums * sums_at_once(processes))) for group in groups.values()),
        max(sums * _squares_at_once(groups, unit, processes) for unit in units),
    )
    widest = max(matrix.shape[-1] for matrix in matrices)
    block = max(unit.dense for name, unit in units.items() if name.startswith(blocks)) * (2 if upcast else 1)
    outside = {name: unit.dense for name, unit in units.items() if not name.startswith(blocks)}
    # A block while it is calibrated; what is outside the blocks, when the first is run or the result compared; a part of that
    # while it is rounded.
    memory = _PROCESS + max(
        block + work + batch * (4 * widest + 8 * hidden) * size,
        sum(outside.values()) * (2 if upcast else 1) + block + settings.length * vocabulary * size,
        max(outside.values(), default=0) + rounding,
    )
    logits = settings.holdout * settings.length * vocabulary * size
    inputs = max(_inputs(matrices, unit) for unit in units)
    packed, dense = sum(unit.packed for unit in units.values()), sum(unit.dense for unit in units.values())
    disk = 2 * packed + tokens // processes * size * (2 * hidden + 2 * inputs) + logits
    if processes > 1 and any(len(matrix.shape) == 3 for matrix in matrices):
        disk += tokens * size * 2 * hidden  # what experts receive, of which each process has all
    seconds = None
    if encoding is not None:
        operations = sum(_operations(group, tokens) for group in groups.values())
        # Error feedback encodes every unit twice: once, and once more in the sweep of coordinate descent.
        seconds = (1 + settings.sweeps) * encoding[0] + encoding[1] + operations / processes / _product_rate(device)
    return Effort(memory, disk, 3 * dense, seconds)


def _units(model: PreTrainedModel, packed_bytes: dict[int, int]) -> dict[str, _Unit]:
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    units: dict[str, _Unit] = {}
    for name, tensor in model.named_parameters():
        unit, dense = units.setdefault(unit_name(name, lists), _Unit()), tensor.numel() * tensor.itemsize
        unit.dense += dense
        unit.packed += packed_bytes.get(id(tensor), dense)
    return units


def _matrices(model: PreTrainedModel, names: list[str], config: PackedConfig) -> list[_Matrix]:
    found = []
    text = model.config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    leaders = _shared_inputs(model, names)
    for name in names:
        for parameter, weight in dense_weights(model.get_submodule(name)).items():
            stack = weight.ndim == 3
            share = min(1.0, chosen / len(weight)) if stack else 1.0
            group = f"{name}.{parameter}" if stack else leaders.get(name, name)
            found.append(_Matrix(name, group, tuple(weight.shape), config.codec_of(name), share))
    return found


def _shared_inputs(model: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """For linear layers the first that has the same input, found by running the model on one token, without values."""
    layers = {name: module for name in names if isinstance(module := model.get_submodule(name), nn.Linear)}
    found = OriginalInputs(names, None)
    with torch.no_grad(), recorded_inputs(layers) as inputs:
        # With a cache: without one, Transformers looks at the values of positions.
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device="meta"), use_cache=True)
        found.add(0, inputs)
    return {name: group[0] for group in found.groups() for name in group}


def _working_memory(group: list[_Matrix], squared: int) -> int:
    """Bytes for calibrating matrices with one input, `squared` of them for the square of it: of a stack, one matrix at a time."""
    rows, columns = sum(matrix.shape[-2] for matrix in group), group[0].shape[-1]
    return _CALIBRATED * rows * columns + squared * columns * columns


def _squares_at_once(groups: dict[str, list[_Matrix]], unit: str, processes: int) -> int:
    """Squares of the numbers of inputs for which sums are in memory, where a block has too many groups for one after another."""
    linear = [
        group[0].shape[-1] ** 2
        for group in groups.values()
        if group[0].module.startswith(f"{unit}.") and len(group[0].shape) == 2
    ]
    if len(linear) <= MAX_STAGES:
        return 0
    return sum(linear) * (PARTS + sums_at_once(processes) - 1) // PARTS


def _inputs(matrices: list[_Matrix], unit: str) -> int:
    """Numbers per token that are kept of the inputs of a unit's groups."""
    widths = {matrix.group: matrix.shape[-1] for matrix in matrices if matrix.module.startswith(f"{unit}.")}
    return sum(widths.values())


def _operations(group: list[_Matrix], tokens: int) -> float:
    """Floating-point operations for matrices with one input: forward passes, moments, and factorizing the Hessian."""
    columns = group[0].shape[-1]
    number = group[0].shape[0] if len(group[0].shape) == 3 else 1
    seen = tokens * group[0].share
    forward = sum(2 * matrix.numel * seen for matrix in group) * _PASSES
    moments = number * 2 * (5 / 8 + 1) * seen * columns**2
    feedback = sum(4 * matrix.numel * columns for matrix in group) + 4 * number * columns**3
    return forward + moments + feedback


def _encoding_rate(codec: Codec, device: torch.device) -> float:
    """Weights of a codec that are encoded per second."""
    weight = torch.randn(256, 8 * codec.multiple, generator=torch.Generator().manual_seed(0)).to(device)
    return weight.numel() / _seconds(lambda: codec.encode(weight))


def _product_rate(device: torch.device) -> float:
    """Floating-point operations of float32 matrix products per second."""
    square = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).to(device)
    return 2 * 1024**3 / _seconds(lambda: square @ square)


def _seconds(run: Callable[[], object]) -> float:
    """How long something takes the second time: the first may compile."""
    for _ in range(2):
        started = time.perf_counter()
        run()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
    return time.perf_counter() - started
