#!/usr/bin/env python3
"""Mixed bits against uniform bits on any model and any tokens: KL and perplexity at counted bits, as JSON.

The rows: the largest uniform setting within the target, the next larger one, and the bits that an allocation chooses for the
target. All are calibrated on the same tokens and compared with the original on the same others. Tokens are files of
int64 `[n, L]`, written by `torch.save`, or by `safetensors` under the name "tokens"; so no tokenizer and no network is needed.
A row that is in the output file is not computed again if all that it depends on is the same, otherwise the file is refused.
An interrupted allocation resumes from --work-dir.

    python benchmarks/mixed_bits.py MODEL --calibration c4.pt --evaluation wikitext2.pt --setting stream-2.0 \\
        --target-bits 2.3 --out mixed.json --work-dir parts
    python benchmarks/mixed_bits.py MODEL ... --dtype bfloat16 --device cuda --blocks 4      # its first four blocks only
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_pcdvq import Calibration, allocate_bits, quantize_model
from hf_pcdvq.allocation.rates import own_settings
from hf_pcdvq.allocation.report import Allocation
from hf_pcdvq.allocation.windows import Windows
from hf_pcdvq.calibration.identity import Identity, differences, model_identity, run_identity, update_with_tensor
from hf_pcdvq.config import PackedConfig, config_of_setting
from hf_pcdvq.evaluation.metrics import evaluate
from hf_pcdvq.files.records import device_name, package_versions, read_object, write_text
from hf_pcdvq.files.size import count_folder


def read_tokens(file: Path) -> torch.Tensor:
    """Windows of tokens int64 `[n, L]`."""
    return load_file(file)["tokens"] if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def load(args: argparse.Namespace) -> PreTrainedModel:
    """The original; with --blocks, without its last decoder blocks."""
    config = AutoConfig.from_pretrained(args.model)
    if args.blocks is not None:
        config.num_hidden_layers = args.blocks
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: args.blocks]
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    return AutoModelForCausalLM.from_pretrained(args.model, config=config, dtype=dtype, device_map=args.device)


def measure(args: argparse.Namespace, name: str, config: PackedConfig, calibration: torch.Tensor) -> dict[str, Any]:
    """Quantize, count the saved file, evaluate."""
    started = time.perf_counter()
    model = quantize_model(load(args), None, config, calibration, device=args.device)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        count = count_folder(Path(folder))
    dense = model.dequantize(model.dtype)  # decoded once rather than for every window
    result = evaluate(load(args), dense, read_tokens(args.evaluation)[: args.windows], progress=False)
    return {
        "row": name,
        "bits_counted": count.bits_per_packed_weight,
        "packed_bytes": count.packed_bytes,
        "file_bytes": count.file_bytes,
        "seconds_to_quantize": round(seconds, 1),
        **result.to_dict(),
    }


def inputs_of(
    args: argparse.Namespace, model: PreTrainedModel, config: PackedConfig, calibration: torch.Tensor
) -> Identity:
    """What rows depend on, as hashes and values by name."""
    evaluation = hashlib.sha256()
    update_with_tensor(evaluation, "windows", read_tokens(args.evaluation)[: args.windows])
    return {
        **run_identity(model_identity(model), [], config, calibration, torch.device(args.device)),
        "the evaluation data": evaluation.hexdigest(),
        "the device": device_name(torch.device(args.device)),
    }


def kept_rows(file: Path, inputs: Identity) -> list[dict[str, Any]]:
    """The rows of the output file; none if there is no file.

    Raises:
        ValueError: they were measured on other inputs, or the file is damaged.
    """
    if not file.is_file():
        return []
    content = read_object(file)
    if content.get("inputs") != inputs:
        raise ValueError(
            f"{file} holds rows of another run, which differs in {differences(content.get('inputs'), inputs)}: choose another "
            "--out, or move it away"
        )
    return content["rows"]


def uniform_settings(config: PackedConfig, base: str) -> list[str]:
    """The largest uniform setting within the target, and the next one."""
    names = list(own_settings(config))
    return names[names.index(base) : names.index(base) + 2]


def write(
    file: Path, args: argparse.Namespace, inputs: Identity, allocation: Allocation, rows: list[dict[str, Any]]
) -> None:
    content = {
        "model": Path(args.model).name,
        "blocks": args.blocks,
        "setting": args.setting,
        "target_bits": args.target_bits,
        "device": device_name(torch.device(args.device)),
        "versions": package_versions(),
        "inputs": inputs,
        "allocation": allocation.to_dict(),
        "rows": rows,
    }
    write_text(file, json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the original model")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE", help="tokens to calibrate on")
    parser.add_argument("--evaluation", type=Path, required=True, metavar="FILE", help="tokens to compare on")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rows that are in it are kept")
    parser.add_argument("--work-dir", type=Path, help="folder for finished parts of the allocation")
    parser.add_argument("--setting", default="stream-2.0", help="whose method's rates to use (default: %(default)s)")
    parser.add_argument("--target-bits", type=float, default=2.3, help="default: %(default)s")
    parser.add_argument("--windows", type=int, default=48, help="windows to compare on (default: %(default)s)")
    parser.add_argument("--allocation-only", action="store_true", help="compute no rows")
    parser.add_argument("--blocks", type=int, help="keep only the first decoder blocks")
    parser.add_argument("--dtype", default="auto", help="of the original (default: as it is saved)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    parser.add_argument("--threads", type=int, help="of the CPU")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    calibration = read_tokens(args.calibration)
    common = {"calibration": Calibration(samples=len(calibration), length=calibration.shape[1], holdout=0)}
    auto = config_of_setting(args.setting, bits="auto", target_bits=args.target_bits, **common)
    original = load(args)
    inputs = inputs_of(args, original, auto, calibration)
    try:
        rows = kept_rows(args.out, inputs)
    except ValueError as error:
        parser.error(str(error))
    allocation = allocate_bits(
        original, None, auto, Windows.of(calibration), device=args.device, work_dir=args.work_dir
    )
    del original
    write(args.out, args, inputs, allocation, rows)
    print(allocation.markdown(), f"\nallocation: {allocation.seconds:.0f} s", flush=True)
    if args.allocation_only:
        return
    settings = {
        f"uniform {name}": config_of_setting(name, **common) for name in uniform_settings(auto, allocation.base)
    }
    settings[f"auto {args.target_bits:g}"] = auto.settled(allocation.base, dict(allocation.overrides))
    for name, config in settings.items():
        if name not in {row["row"] for row in rows}:
            rows.append(measure(args, name, config, calibration))
            write(args.out, args, inputs, allocation, rows)
            print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
