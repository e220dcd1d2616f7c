"""How fast a packed model writes on this machine: `speed.json`, from which its model card states it."""

from __future__ import annotations

import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hf_pcdvq_kernels import get_backend
from tqdm.auto import tqdm

from .measured import SPEED
from .provenance import package_versions, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMAT = 1


@dataclass(frozen=True)
class Speed:
    """Speed of greedy generation, one sequence at a time.

    Attributes:
        tokens_per_second: new tokens by the time they took, the prompt included; the median of several runs.
        prompt_tokens, new_tokens: their numbers in one run.
        device: its name.
        dtype: of what is not packed.
        backend: as `hf_pcdvq.get_backend` gives it.
        cache_implementation: as it was given.
        peak_memory_bytes: the most that was allocated on the accelerator meanwhile; None on a CPU.
    """

    tokens_per_second: float
    prompt_tokens: int
    new_tokens: int
    device: str
    dtype: str
    backend: str
    cache_implementation: str | None
    peak_memory_bytes: int | None

    def write(self, folder: Path) -> None:
        """Write `speed.json` beside the model."""
        record = {"format": _FORMAT, **asdict(self), "versions": package_versions()}
        write_text(folder / SPEED, json.dumps(record, indent=2) + "\n")


def measure_speed(
    model: PreTrainedModel,
    prompt_tokens: int = 16,
    new_tokens: int = 64,
    runs: int = 3,
    progress: bool = True,
    cache_implementation: str | None = None,
) -> Speed:
    """Let a model write `new_tokens` tokens after a prompt, once to warm up and `runs` times for the record.

    Args:
        cache_implementation: that of Transformers' `generate`. With `"static"` it compiles the model, if that is on a
            GPU; None takes the model's default.

    Raises:
        ValueError: prompt and new tokens do not fit into the model's positions.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and prompt_tokens + new_tokens > positions:
        raise ValueError(f"{prompt_tokens} + {new_tokens} tokens do not fit into the model's {positions} positions")
    device = model.get_input_embeddings().weight.device
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    if accelerator is not None:
        accelerator.reset_peak_memory_stats(device)
    ids = torch.arange(prompt_tokens, device=device)[None] % config.vocab_size
    # min_new_tokens, so that no run ends early.
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    if cache_implementation is not None:  # given as None, it would replace that of the model's generation config
        options["cache_implementation"] = cache_implementation
    seconds = []
    for _ in tqdm(range(1 + runs), desc="Generating", unit="run", disable=not progress):
        started = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        if accelerator is not None:
            accelerator.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return Speed(
        tokens_per_second=new_tokens / statistics.median(seconds[1:]),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        device=_device_name(device),
        dtype=str(model.dtype).removeprefix("torch."),
        backend=get_backend(),
        cache_implementation=cache_implementation,
        peak_memory_bytes=accelerator.max_memory_allocated(device) if accelerator is not None else None,
    )


def _device_name(device: torch.device) -> str:
    """What its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    names = Path("/proc/cpuinfo")
    found = (
        [line for line in names.read_text().splitlines() if line.startswith("model name")] if names.exists() else []
    )
    name = found[0].partition(":")[2].strip() if found else platform.machine()
    return f"a CPU ({name}, {torch.get_num_threads()} threads)"
