"""What becomes of a damaged folder: every command must refuse it with one clear error, or work with the right weights."""

from __future__ import annotations

import logging
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import byte_tokenizer
from damage import damage
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import hf_pcdvq
from hf_pcdvq import PcdvqConfig
from hf_pcdvq.files.size import count_folder
from hf_pcdvq.publish.integrity import check_folder

LIMIT = 5  # seconds
_OURS = str(Path(hf_pcdvq.__file__).parent)
_IDS = torch.arange(3, 20)[None]


class Hang(BaseException):
    """A command took longer than the limit."""


@dataclass(frozen=True)
class Outcome:
    """What a case led to.

    Attributes:
        number: seed of the damage.
        kind: what was damaged.
        inspect, check: `"passed"` or `"refused"`.
        load: `"same"` or `"different"` weights, `"refused"` by us, or an `"error of Transformers"`, which reads some
            files before we do.
        faults: what should not have happened, in words.
    """

    number: int
    kind: str
    inspect: str
    check: str
    load: str
    faults: tuple[str, ...]


def make_folder(folder: Path) -> Tensor:
    """Save a tiny packed model in shards, with two settings and a tokenizer. Returns its logits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=258, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.2, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    with quiet():
        LlamaForCausalLM(config).save_pretrained(folder / "dense")
        packing = PcdvqConfig(2.0, overrides={r"layers\.0\.self_attn": "int8", "down_proj": None})
        model = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=packing)
        shutil.rmtree(folder / "dense")
        model.save_pretrained(folder, max_shard_size="30KB")
        byte_tokenizer().save_pretrained(folder)
        return _load(folder)


def run_case(number: int, intact: Path, expected: Tensor, work: Path) -> Outcome:
    """Damage a copy of an intact folder and try every command on it."""
    folder = work / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(intact, folder)
    kind = damage(number, folder)
    faults: list[str] = []
    with quiet():
        inspected = _try("inspect", lambda: count_folder(folder), folder, faults)
        checked = _try("check", lambda: check_folder(folder), folder, faults)
        loaded = _try("load", lambda: _load(folder), folder, faults)
    if isinstance(loaded, Tensor):
        loaded = "same" if torch.allclose(loaded, expected, rtol=1e-4, atol=1e-4) else "different"
    if checked == "passed" and loaded == "different":
        faults.append("check passes a wrong model")
    return Outcome(number, kind, inspected, checked, loaded, tuple(faults))


def _load(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(_IDS).logits


def _try(command: str, run: Callable[[], object], folder: Path, faults: list[str]) -> str | Tensor:
    try:
        with limited():
            result = run()
    except (Exception, Hang) as error:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        ours = any(name.startswith(_OURS) for name in frames)
        if command == "load" and not ours:
            return "error of Transformers"
        clear = isinstance(error, (ValueError, OSError)) and len(str(error)) > 20
        if not clear or (command != "load" and folder.name not in str(error)):
            faults.append(f"{command}: {type(error).__name__}: {str(error)[:200]}")
        return "refused"
    return result if isinstance(result, Tensor) else "passed"


@contextmanager
def limited() -> Iterator[None]:
    """Raise `Hang` in the body after the limit."""

    def stop(*_: object) -> None:
        raise Hang(f"still running after {LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings and progress bars."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
