"""Quantizes, saves, loads and dequantizes a tiny model of every architecture in Transformers, and compares the results.

    python tests/zoo/sweep.py [--heads causal masked ...] [--only llama mixtral ...] [--out benchmarks/results/zoo.json]

An architecture works if the packed model computes what its dequantized twin computes, before and after saving, and what
is loaded with `dequantize=True` computes the same. Every outcome is written at once, so an interrupted sweep continues;
delete the file to start again. Takes a few seconds per architecture on one core.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import inputs_of, tiny_configs
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_pcdvq import PcdvqConfig
from hf_pcdvq.modules import PackedModule

HEADS = {
    "causal": ("AutoModelForCausalLM", transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
    "masked": ("AutoModelForMaskedLM", transformers.MODEL_FOR_MASKED_LM_MAPPING),
    "seq2seq": ("AutoModelForSeq2SeqLM", transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    "classification": ("AutoModelForSequenceClassification", transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "image": ("AutoModelForImageClassification", transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING),
    "base": ("AutoModel", transformers.MODEL_MAPPING),
}
MOST_PARAMETERS = 60_000_000  # of a model that is quantized in seconds
SECONDS = 120  # for one architecture
TOLERANCE = 1e-3  # relative, in float32: the rotation is applied to activations in one model, to weights in the other


class NotBuilt(Exception):
    """No tiny model of the architecture can be made or run, so nothing is said about it."""


def architectures(head: str) -> list[str]:
    """The model types that have a head, by name."""
    names = transformers.CONFIG_MAPPING.items()
    mapping = HEADS[head][1]
    return sorted(name for name, config in names if config in mapping)


def outputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The model's first floating-point output, flat."""
    torch.manual_seed(0)
    with torch.no_grad():
        found = model.eval()(**inputs)
    return next(
        value for value in found.values() if isinstance(value, Tensor) and value.is_floating_point()
    ).flatten()


def difference(a: Tensor, b: Tensor) -> float:
    """Norm of the difference relative to the norm of `b`; infinite if either is not finite."""
    error = ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
    return error if a.isfinite().all() and b.isfinite().all() else float("inf")


def one_line(error: Exception) -> str:
    """What an error says, short."""
    return " ".join(str(error).split())[:200]


def save_dense_model(head: str, model_type: str, folder: Path) -> dict[str, Tensor]:
    """Save a random tiny model that computes something finite, the same after loading; returns inputs for it."""
    reasons: list[str] = []
    try:
        for config in tiny_configs(model_type):
            try:
                return _save(head, config, folder)
            except TimeoutError:
                raise
            except Exception as error:  # whatever the architecture raises for such sizes
                reasons.append(f"{type(error).__name__}: {error}")
                shutil.rmtree(folder, ignore_errors=True)
    except ValueError as error:  # of the configuration, also one that its own defaults violate
        raise NotBuilt(error) from error
    raise NotBuilt(reasons[0])


def _save(head: str, config: PreTrainedConfig, folder: Path) -> dict[str, Tensor]:
    auto = getattr(transformers, HEADS[head][0])
    with torch.device("meta"):
        size = auto.from_config(config).num_parameters()
    if size > MOST_PARAMETERS:
        raise NotBuilt(f"{size} parameters are not tiny")
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    inputs = inputs_of(model, 1 if head == "classification" else 2)
    model.save_pretrained(folder)
    reloaded = auto.from_pretrained(folder, dtype=torch.float32)
    if not difference(outputs(reloaded, inputs), outputs(model, inputs)) < TOLERANCE:
        raise NotBuilt("the dense model's outputs are not finite, or change when it is saved and loaded")
    return inputs


def examine(head: str, model_type: str, work: Path) -> dict[str, Any]:
    """Take one architecture through every step. Raises what a step raises, with the step's name in its notes."""
    auto = getattr(transformers, HEADS[head][0])
    inputs = save_dense_model(head, model_type, work / "dense")
    step = "quantizing"
    try:
        model = auto.from_pretrained(work / "dense", dtype=torch.float32, quantization_config=PcdvqConfig())
        step = "running"
        found = outputs(model, inputs)
        step = "saving"
        model.save_pretrained(work / "packed")
        step = "loading"
        again = auto.from_pretrained(work / "packed", dtype=torch.float32)
        errors = {"reloaded": difference(outputs(again, inputs), found)}
        step = "dequantizing"
        twin = outputs(again.dequantize(torch.float32), inputs)
        errors["dequantized"] = difference(found, twin)
        step = "loading with dequantize=True"
        opened = auto.from_pretrained(
            work / "packed", dtype=torch.float32, quantization_config=PcdvqConfig(dequantize=True)
        )
        errors["dequantized on load"] = difference(outputs(opened, inputs), twin)
    except Exception as error:
        error.add_note(step)
        raise
    wrong = {name: error for name, error in errors.items() if error > TOLERANCE}
    left = model.config.quantization_config.left_unpacked
    return {
        "outcome": "differs" if wrong else "works",
        "packed": sum(isinstance(module, PackedModule) for module in model.modules()),
        "read by others": sorted(name for name, why in left.items() if "reads its weight" in why),
        "errors": {name: float(f"{error:.1e}") for name, error in errors.items()},
    }


def outcome(head: str, model_type: str) -> dict[str, Any]:
    """`examine` in a temporary folder and within the time limit; what it raises becomes an outcome."""

    def late(signum: int, frame: Any) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with tempfile.TemporaryDirectory() as work:
            return examine(head, model_type, Path(work))
    except NotBuilt as error:
        return {"outcome": "not built", "reason": one_line(error)}
    except Exception as error:
        step = "".join(getattr(error, "__notes__", [])[-1:])
        # The package refuses with a ValueError that says that there is nothing to pack.
        refused = step == "quantizing" and isinstance(error, ValueError) and "has no layer that" in str(error)
        return {
            "outcome": "refused" if refused else "fails",
            "step": step,
            "reason": f"{type(error).__name__}: {one_line(error)}",
        }
    finally:
        signal.alarm(0)


def main() -> None:
    """Sweep what the command line asks for, and print one line per architecture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=["causal"])
    parser.add_argument("--only", nargs="+", help="model types; all without it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/zoo.json"))
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    results = json.loads(asked.out.read_text()) if asked.out.exists() else {"transformers": transformers.__version__}
    for head in asked.heads:
        done = results.setdefault(head, {})
        for model_type in architectures(head):
            if model_type in done or (asked.only and model_type not in asked.only):
                continue
            done[model_type] = outcome(head, model_type)
            print(head, model_type, done[model_type]["outcome"], done[model_type].get("reason", ""), flush=True)
            temporary = asked.out.with_suffix(".part")
            temporary.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
            temporary.replace(asked.out)


if __name__ == "__main__":
    main()
