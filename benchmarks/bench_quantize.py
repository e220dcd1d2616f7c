#!/usr/bin/env python3
"""What quantizing takes: the time of several processes against one, and the memory for a model that does not fit in it.

`processes` calibrates the first decoder blocks of a model by the command line, alone and under `torchrun`, one thread per process, in
turns, and checks that the files are the same. `memory` writes a randomly initialized checkpoint with the shapes of Llama-3-8B (16 GB,
deleted afterwards), rounds it, and reads the peak of the resident memory. Nothing else should run on the machine.

    python benchmarks/bench_quantize.py processes --model SmolLM2-135M-Instruct --dataset c4.txt --work scratch
    python benchmarks/bench_quantize.py memory --work scratch
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from bench_generate import llama_3_8b
from random_models import tiny
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from hf_pcdvq.files.records import device_name, package_versions, write_text

RESULTS = Path(__file__).resolve().parent / "results"
_SHARD_LAYERS = 4  # of the large checkpoint, written at once


def first_blocks(model: str, blocks: int, folder: Path) -> None:
    """Save a model without its last decoder blocks, and its tokenizer."""
    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers = blocks
    AutoModelForCausalLM.from_pretrained(model, config=config, dtype="auto").save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def quantize(processes: int, threads: int, source: Path, out: Path, *options: str) -> tuple[float, int]:
    """Run the command; returns the seconds that it took, and the peak of its resident memory in bytes.

    The system counts the memory of this process to that of the command until this begins.
    """
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command += ["hf_pcdvq_cli", "quantize", str(source), "--out", str(out), "--force", *options]
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return time.perf_counter() - started, 1024 * usage.ru_maxrss


def measure_processes(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the blocks and of the whole command, by number of processes; and how many times as fast as one."""
    source, out = args.work / "source", args.work / "packed"
    first_blocks(args.model, args.blocks, source)
    options = ("--setting", args.setting, "--dataset", args.dataset)
    options += ("--samples", str(args.samples), "--length", str(args.length))
    seconds: dict[int, list[tuple[float, float]]] = {count: [] for count in args.processes}
    files = set()
    for _ in range(args.rounds):
        for count, measured in seconds.items():
            whole, _ = quantize(count, 1, source, out, *options)
            report = json.loads((out / "quantization_report.json").read_text(encoding="utf-8"))
            measured.append((sum(block["seconds"] for block in report["blocks"]), whole))
            files.add((out / "model.safetensors").read_bytes())
            shutil.rmtree(out)
    if len(files) > 1:
        raise SystemExit("the files of different numbers of processes differ")
    rows = {
        str(count): {
            "blocks": statistics.median(blocks for blocks, _ in measured),
            "whole": statistics.median(whole for _, whole in measured),
        }
        for count, measured in seconds.items()
    }
    alone = rows[str(args.processes[0])]["blocks"]
    return {
        "model": Path(args.model).name,
        "setting": args.setting,
        "blocks": args.blocks,
        "samples": args.samples,
        "length": args.length,
        "rounds": args.rounds,
        "threads of each process": 1,
        "seconds": rows,
        "times as fast": {count: alone / row["blocks"] for count, row in rows.items()},
        "the same files": True,
    }


def write_checkpoint(config: PreTrainedConfig, folder: Path) -> int:
    """A randomly initialized checkpoint in bf16, in files of a few layers; returns its bytes."""
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    config.architectures, config.dtype = [AutoModelForCausalLM._model_mapping[type(config)].__name__], "bfloat16"
    config.save_pretrained(folder)
    parts: dict[str, list[str]] = {}
    for name in shapes:
        number = name.split(".layers.")[1].split(".")[0] if ".layers." in name else None
        parts.setdefault("outside" if number is None else str(int(number) // _SHARD_LAYERS), []).append(name)
    index, total = {}, 0
    for part, names in parts.items():
        file = f"model-{part}.safetensors"
        tensors = {name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        index |= dict.fromkeys(names, file)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    write_text(folder / "model.safetensors.index.json", json.dumps(content))
    return total


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory of rounding a model with the shapes of Llama-3-8B."""
    source, out = args.work / "large", args.work / "packed"
    source.mkdir()
    config = tiny() if args.smoke else llama_3_8b()
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as another:  # this one stays small
            dense = another.submit(write_checkpoint, config, source).result()
        seconds, peak = quantize(1, args.threads, source, out, "--setting", args.setting, "--no-calibration")
        packed = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    finally:
        for folder in (source, out):
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "setting": args.setting,
        "dense bytes": dense,
        "packed bytes": packed,
        "peak resident bytes": peak,
        "seconds": seconds,
        "threads": args.threads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("processes", "memory"))
    parser.add_argument("--work", type=Path, required=True, help="an empty or a new folder")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "quantize.json", help="JSON file (default: %(default)s)"
    )
    parser.add_argument("--setting", help="default: pcdvq-2.25; pcdvq-2.0 of the part memory")
    parser.add_argument("--threads", type=int, default=2, help="of the part memory (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a tiny model in the part memory")
    parser.add_argument("--model", help="of the part processes: folder of the original")
    parser.add_argument("--dataset", help="of the part processes: a text file")
    parser.add_argument("--blocks", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="the first is compared with")
    parser.add_argument("--samples", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--length", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args()
    if args.part == "processes" and not (args.model and args.dataset):
        parser.error("the part processes needs --model and --dataset")
    args.work.mkdir(parents=True, exist_ok=True)
    if any(args.work.iterdir()):
        parser.error(f"--work {args.work} is not empty")
    args.setting = args.setting or {"processes": "pcdvq-2.25", "memory": "pcdvq-2.0"}[args.part]
    measured = {"processes": measure_processes, "memory": measure_memory}[args.part](args)
    content = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    content[args.part] = {"machine": device_name(torch.device("cpu")), "versions": package_versions(), **measured}
    write_text(args.out, json.dumps(content, indent=2) + "\n")
    print(json.dumps(content[args.part], indent=2))


if __name__ == "__main__":
    main()
