"""What people do with a packed model on a GPU, each compared with its dequantized twin or with itself run plainly."""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import hf_pcdvq
from hf_pcdvq.config import config_of_setting

SETTINGS = ("pcdvq-2.25", "ccq-2.5", "stream-2.0")
# Activations and weights rounded to float16, through the blocks; eight times that of one product.
TOLERANCE = 1.5e-2


class Pair:
    """A packed model that was saved and loaded again, the same with decoded weights, and an input."""

    def __init__(self, setting: str, folder: Path, device: str):
        width = 128 if device == "cpu" else 1024
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=11 * width // 4,
            num_hidden_layers=4,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 128,
            vocab_size=1024,
            initializer_range=0.05,
            tie_word_embeddings=False,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder / "dense")
        self.folder, self.device = folder / "packed", device
        quantized = AutoModelForCausalLM.from_pretrained(
            folder / "dense", quantization_config=config_of_setting(setting), device_map=device
        )
        quantized.save_pretrained(self.folder)
        self.packed = AutoModelForCausalLM.from_pretrained(self.folder, device_map=device)
        self.twin = AutoModelForCausalLM.from_pretrained(
            self.folder, quantization_config=config_of_setting(setting, dequantize=True), device_map=device
        )
        self.ids = torch.randint(config.vocab_size, (1, 24), device=device)

    @torch.no_grad()
    def logits(self, model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
        return model(self.ids if ids is None else ids).logits.float()


def close(out: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> float:
    """The relative error; raises ValueError if it is not below the tolerance."""
    error = ((out.double() - expected.double()).norm() / expected.double().norm()).item()
    if not error < tolerance:
        raise ValueError(f"relative error {error:.2e}, not below {tolerance:.0e}")
    return error


def dequantized_twin(pair: Pair) -> float:
    return max(
        close(pair.logits(pair.packed, pair.ids[:, :n]), pair.logits(pair.twin, pair.ids[:, :n])) for n in (1, 3, 24)
    )


def compiled(pair: Pair) -> float:
    expected = pair.logits(pair.packed)
    return close(pair.logits(torch.compile(pair.packed, fullgraph=True)), expected)


def cuda_graph(pair: Pair) -> float:
    """A decoder block as a graph, replayed with another input."""
    block = pair.packed.model.layers[0].mlp
    states = torch.randn(1, 1, pair.packed.config.hidden_size, device=pair.device, dtype=torch.float16)
    with torch.no_grad():
        block(states)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = block(states)
        states.mul_(-0.5)
        graph.replay()
        return close(out, block(states), 1e-6)


def generation(pair: Pair) -> float:
    """With a static cache, which Transformers compiles, the tokens of a dynamic one."""
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    one = pair.packed.generate(pair.ids[:, :8], **options)
    other = pair.packed.generate(pair.ids[:, :8], cache_implementation="static", **options)
    if not torch.equal(one, other):
        raise ValueError(f"{one.tolist()} and {other.tolist()} differ")
    return 0.0


def lora(pair: Pair) -> float:
    """Gradients of adapters on packed layers are those on decoded ones."""
    from peft import LoraConfig, get_peft_model

    grads = []
    for model in (pair.packed, pair.twin):
        torch.manual_seed(1)
        adapted = get_peft_model(
            copy.deepcopy(model), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        )
        adapted(pair.ids, labels=pair.ids).loss.backward()
        grads.append(torch.cat([p.grad.flatten().float() for n, p in adapted.named_parameters() if "lora" in n]))
    return close(*grads, 5e-2)


def offloaded(pair: Pair) -> float:
    """Blocks in the memory of the CPU and on disk, brought to the GPU by accelerate."""
    places: dict[str, str] = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), pair.device
    )
    places |= {f"model.layers.{i}": place for i, place in enumerate((pair.device, "cpu", "cpu", "disk"))}
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(pair.folder, device_map=places, offload_folder=folder)
        return close(pair.logits(model), pair.logits(pair.packed), 1e-6)


def copy_on_another_stream(pair: Pair) -> float:
    """A copy on the same device, run in another stream."""
    stream = torch.cuda.Stream()
    replica = copy.deepcopy(pair.packed)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        out = pair.logits(replica)
    stream.synchronize()
    return close(out, pair.logits(pair.packed), 1e-6)


FEATURES: tuple[Callable[[Pair], float], ...] = (
    dequantized_twin,
    cuda_graph,
    lora,
    offloaded,
    copy_on_another_stream,
    compiled,
    generation,
)
DRY = (dequantized_twin, lora)


def tried(feature: Callable[[Pair], float], pair: Pair) -> dict[str, object]:
    """The row of a feature, with its error where it failed."""
    started = time.perf_counter()
    try:
        found: dict[str, object] = {"passed": True, "error": feature(pair)}
    except Exception:  # whatever it is, the others are still tried
        found = {"passed": False, "traceback": traceback.format_exc()}
    return {"feature": feature.__name__, **found, "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    device, settings, features = ("cpu", SETTINGS[:1], DRY) if args.dry_run else ("cuda", args.settings, FEATURES)
    hf_pcdvq.set_backend("reference" if args.dry_run else "triton")
    rows = []
    for setting in settings:
        with tempfile.TemporaryDirectory() as folder:
            pair = Pair(setting, Path(folder), device)
            for feature in features:
                rows.append({"setting": setting, **tried(feature, pair)})
                (args.out / "features.json").write_text(json.dumps(rows, indent=1) + "\n")
                row = rows[-1]
                print(f"{setting}, {feature.__name__}: {row.get('error', row.get('traceback'))}", flush=True)
    sys.exit(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    main()
