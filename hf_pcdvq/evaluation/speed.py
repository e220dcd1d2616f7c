"""How fast a packed model generates on this machine: `speed.json`, which its model card quotes."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hf_pcdvq_kernels.backend import backend_for

from ..files.fields import number, positive_integer, short_text
from ..files.records import device_name, known_fields, package_versions, write_text
from ..progress import progress_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "speed"
_FORMAT = 1


@dataclass(frozen=True)
class Speed:
    """Speed of greedy generation, one sequence at a time.

    Attributes:
        tokens_per_second: new tokens by the time of the whole run, prompt included; the median of several runs.
        prompt_tokens, new_tokens: number of each in one run.
        device: name of the device.
        dtype: dtype of what is not packed.
        backend: what decoded the weights, `"triton"`, `"cpu"` or `"reference"`.
        cache_implementation: as passed to `measure_speed`.
        peak_memory_bytes: peak of the memory allocated on the accelerator; None on a CPU.
    """

    tokens_per_second: float
    prompt_tokens: int
    new_tokens: int
    device: str
    dtype: str
    backend: str
    cache_implementation: str | None
    peak_memory_bytes: int | None

    def write(self, folder: str | Path) -> None:
        """Write `speed.json` beside the model."""
        record = {"format": _FORMAT, **asdict(self), "versions": package_versions()}
        write_text(Path(folder) / f"{NAME}.json", json.dumps(record, indent=2) + "\n")

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Speed:
        """The result from the content of `speed.json`.

        Raises:
            ValueError: the content has another format, is incomplete, or a field has another type.
        """
        speed = cls(**known_fields(cls, content, _FORMAT))
        number("tokens_per_second", speed.tokens_per_second)
        for name in ("device", "dtype", "backend"):
            short_text(name, getattr(speed, name))
        for name in ("prompt_tokens", "new_tokens"):
            positive_integer(name, getattr(speed, name))
        if speed.peak_memory_bytes is not None:
            positive_integer("peak_memory_bytes", speed.peak_memory_bytes)
        return speed


def measure_speed(
    model: PreTrainedModel,
    prompt_tokens: int = 16,
    new_tokens: int = 64,
    runs: int = 3,
    progress: bool = True,
    cache_implementation: str | None = None,
) -> Speed:
    """Time a model that generates `new_tokens` tokens after a prompt, in `runs` runs after a warm-up run.

    Args:
        model: a causal language model, packed or not.
        prompt_tokens, new_tokens: number of each in one run.
        runs: number of timed runs.
        progress: show the progress.
        cache_implementation: as for Transformers' `generate`. With `"static"`, `generate` compiles a model on a GPU;
            None takes the model's default.

    Raises:
        ValueError: prompt and new tokens exceed the model's positions.
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
    # min_new_tokens keeps runs from ending early.
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    if cache_implementation is not None:  # None would override the model's generation config
        options["cache_implementation"] = cache_implementation
    seconds = []
    for _ in progress_of(range(1 + runs), desc="Generating", unit="run", shown=progress):
        started = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        if accelerator is not None:
            accelerator.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return Speed(
        tokens_per_second=new_tokens / statistics.median(seconds[1:]),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        device=device_name(device),
        dtype=str(model.dtype).removeprefix("torch."),
        backend=backend_for(device, model.dtype),
        cache_implementation=cache_implementation,
        peak_memory_bytes=accelerator.max_memory_allocated(device) if accelerator is not None else None,
    )
