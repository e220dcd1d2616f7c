#!/usr/bin/env python3
"""Our formats and other projects' on the same model, data and evaluation: quality against counted bits.

Every peer is installed into an environment of its own with the same PyTorch, quantizes SmolLM2-135M-Instruct there
(benchmarks/peers/with_*.py), and writes the decoded weights, which are evaluated here by the protocol of
benchmarks/quality.py. A peer that cannot be installed or run is listed with its error. Rows that are in the output file
are not computed again, except those with an error.

Texts are found as in benchmarks/quality.py; our own rows are shown beside the peers' only where the texts are the same.

    python benchmarks/compare_peers.py --out benchmarks/results/peers_smollm2.json                 # hours
    python benchmarks/compare_peers.py --out benchmarks/results/peers_smollm2.json --only HQQ --only Q2_K
    python benchmarks/compare_peers.py --out benchmarks/results/peers_smollm2.json --table         # table and plot only
    python benchmarks/compare_peers.py --out mine.json --only HQQ --text mine.txt --dataset other.txt
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any, NamedTuple

import quality
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from texts import CALIBRATION, WIKITEXT2, Texts, add_text_options, read_results, texts_of
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_pcdvq.calibration.data import read_windows
from hf_pcdvq.evaluation.comparison import HEADINGS, Point, plot_quality, point_rows
from hf_pcdvq.evaluation.metrics import compare_logits
from hf_pcdvq.files.records import write_text

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = Path(__file__).resolve().parent / "peers"
OURS = ROOT / "benchmarks" / "results" / "quality_smollm2.json"
SAMPLES, LENGTH = 128, 1024  # calibration windows, tokens per window
IMPORTANCE_SAMPLES = 32  # how many of these windows llama.cpp's importance matrix is computed on


class Peer(NamedTuple):
    """One row: a peer with options. Rows with the same adapter share an environment."""

    name: str
    adapter: str
    requirements: tuple[str, ...]
    options: dict[str, Any]


HQQ = "hqq", ("hqq",)
QUANTO = "quanto", ("optimum-quanto",)
TORCHAO = "torchao", ("torchao",)
LLAMACPP = "llamacpp", ("ik-llama-cpp-python",)
GPTQ = "gptqmodel", ("gptqmodel", "transformers")
AUTOROUND = "autoround", ("auto-round", "transformers")
PEERS = [
    Peer("llama.cpp IQ2_XXS", *LLAMACPP, {"type": "iq2_xxs"}),
    Peer("llama.cpp IQ2_S", *LLAMACPP, {"type": "iq2_s"}),
    Peer("llama.cpp Q2_K", *LLAMACPP, {"type": "q2_K"}),
    Peer("llama.cpp IQ3_XXS", *LLAMACPP, {"type": "iq3_xxs"}),
    Peer("ik_llama.cpp IQ2_KT", *LLAMACPP, {"type": "iq2_kt"}),
    Peer("HQQ 2-bit, groups of 64", *HQQ, {"bits": 2, "group_size": 64}),
    Peer("HQQ 3-bit, groups of 64", *HQQ, {"bits": 3, "group_size": 64}),
    Peer("quanto qint2, groups of 128", *QUANTO, {"bits": 2, "group_size": 128}),
    Peer("quanto qint4, groups of 128", *QUANTO, {"bits": 4, "group_size": 128}),
    Peer("torchao int2, groups of 64", *TORCHAO, {"bits": 2, "group_size": 64}),
    Peer("torchao int3, groups of 64", *TORCHAO, {"bits": 3, "group_size": 64}),
    Peer("GPTQModel 2-bit, groups of 64", *GPTQ, {"bits": 2, "group_size": 64, "sym": False}),
    Peer("GPTQModel 3-bit, groups of 64", *GPTQ, {"bits": 3, "group_size": 64, "sym": False}),
    Peer(
        "AutoRound 2-bit, groups of 64",
        *AUTOROUND,
        {"bits": 2, "group_size": 64, "iters": 50, "samples": 64, "length": 512},
    ),
]


class PeerError(Exception):
    """A peer could not be installed or run; the message ends with the last lines of its output."""


def run(command: list[Any], log: Path, timeout: float, what: str) -> None:
    """Run a command with its output in `log`.

    Raises:
        PeerError: it failed, or took longer than `timeout` seconds.
    """
    with log.open("w") as stream:
        try:
            subprocess.run(list(map(str, command)), stdout=stream, stderr=stream, check=True, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise PeerError(f"{what}: stopped after {timeout:.0f} seconds") from error
        except subprocess.CalledProcessError as error:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise PeerError(f"{what}: exit code {error.returncode}: {' | '.join(lines[-3:])[-600:]}") from error


def environment(peer: Peer, work: Path, timeout: float) -> Path:
    """The Python of the peer's environment, which is created if it does not exist.

    Raises:
        PeerError: the installation failed.
    """
    folder = work / "environments" / peer.adapter
    stamp = folder / ".installed"
    python = folder / "bin" / "python"
    if not stamp.is_file():
        pins = work / "pins.txt"
        pins.write_text(f"torch=={torch.__version__.split('+')[0]}\n")
        venv.create(folder, with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "-c", pins, "torch", "safetensors", "numpy", *peer.requirements]
        run(install, work / f"{peer.adapter}.install.log", timeout, "installation")
        stamp.touch()
    return python


def prepare(work: Path, reference: quality.Reference, texts: Texts) -> Path:
    """The folder that adapters read: model, names of weights, calibration tokens, and mean squares of the inputs.

    It depends on nothing but the model and the calibration text, so that of an earlier run is used again.
    """
    name = texts.calibration_name(CALIBRATION)
    source = work / f"source-{re.sub(r'[^a-zA-Z0-9.]+', '-', name)}"
    if (source / "inputs.safetensors").is_file():  # written last
        return source
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    shutil.copytree(reference.folder, source / "model")
    model = reference.upcast(reference.load())
    layers = decoder_layers(model)
    (source / "layers.json").write_text(json.dumps([f"{name}.weight" for name in layers]))
    tokens = read_windows(texts.calibration_data(CALIBRATION), reference.tokenizer, SAMPLES, LENGTH, seed=0)
    save_file({"tokens": tokens}, source / "tokens.safetensors")
    save_file(mean_squares(model, layers, tokens[:IMPORTANCE_SAMPLES]), source / "inputs.safetensors")
    return source


def decoder_layers(model: PreTrainedModel) -> list[str]:
    """Names of all linear layers except the output head: the layers that our own rows quantize."""
    head = model.get_output_embeddings()
    return [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and part is not head]


@torch.inference_mode()
def mean_squares(model: PreTrainedModel, layers: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """For each weight the mean square of each of its inputs, float32 `[in]`: llama.cpp's importance matrix."""
    sums = {f"{name}.weight": torch.zeros(model.get_submodule(name).in_features) for name in layers}

    def hook(name):
        def add(module, inputs):
            sums[name] += inputs[0].float().square().mean((0, 1))

        return add

    for name in layers:
        model.get_submodule(name).register_forward_pre_hook(hook(f"{name}.weight"))
    for window in tqdm(tokens, desc="Importance", unit="window"):
        model(input_ids=window[None], use_cache=False, logits_to_keep=1)
    return {name: total / len(tokens) for name, total in sums.items()}


def measure(peer: Peer, source: Path, reference: quality.Reference, args: argparse.Namespace) -> dict[str, Any]:
    """Quantize in the peer's environment, evaluate in ours."""
    with tempfile.TemporaryDirectory(dir=args.work) as parent:
        out = Path(parent) / "model"
        start = time.perf_counter()
        try:
            python = environment(peer, args.work, args.timeout)
            command = [python, ADAPTERS / f"with_{peer.adapter}.py", source, out, json.dumps(peer.options)]
            run(command, args.work / f"{peer.adapter}.log", args.timeout, "quantization")
        except PeerError as error:
            return {"peer": peer.name, "options": peer.options, "error": str(error)}
        seconds = time.perf_counter() - start
        count = json.loads((out / "count.json").read_text())
        model = reference.upcast(AutoModelForCausalLM.from_pretrained(out))
        logits = quality.window_logits(model, reference.windows)
        result = compare_logits(zip(reference.logits(), logits), reference.windows)
    return {
        "peer": peer.name,
        "options": peer.options,
        "versions": count["versions"],
        "bits_counted": 8 * count["bytes"] / count["weights"],
        "seconds": round(seconds, 1) if args.timed else None,
        **result.to_dict(),
    }


def own_rows() -> list[dict[str, Any]]:
    """The rows of benchmarks/quality.py with default options; for each setting the one with most calibration windows."""
    rows = json.loads(OURS.read_text(encoding="utf-8"))["rows"]
    plain = [
        row
        for row in rows
        if row["row"] == f"{row['setting']}, {CALIBRATION}, {row['calibration']['samples']} windows"
    ]
    best: dict[str, dict[str, Any]] = {}
    for row in sorted(plain, key=lambda row: row["calibration"]["samples"]):
        best[row["setting"]] = row
    return [{"peer": name, **row} for name, row in best.items()]


def seen(row: dict[str, Any]) -> tuple[int, int] | None:
    """On how many windows of how many tokens a row was calibrated; None if it saw no data."""
    if "calibration" in row:  # ours
        return row["calibration"]["samples"], row["calibration"]["length"]
    (adapter,) = {peer.adapter for peer in PEERS if peer.name == row["peer"]}
    known = {"gptqmodel": (SAMPLES, LENGTH), "llamacpp": (IMPORTANCE_SAMPLES, LENGTH)}
    if adapter == "autoround":
        return row["options"]["samples"], row["options"]["length"]
    return known.get(adapter)


def point(row: dict[str, Any], group: str) -> Point:
    figures = (row["perplexity_packed"], row["kl_mean"], row["kl_p90"], row["top1_agreement"])
    data = seen(row)
    name = row["peer"] if data is None else f"{row['peer']} ({data[0]} x {data[1]})"
    return Point(name, row["bits_counted"], *figures, "data-free" if data is None else "calibrated", group)


def show(file: Path, rows: list[dict[str, Any]], text: str, calibration_text: str) -> None:
    """Print the table and draw the plot beside the file."""
    ours = own_rows() if (text, calibration_text) == (WIKITEXT2, CALIBRATION) else []
    measured = [*ours, *(row for row in rows if "error" not in row)]
    points = [point(row, "hf_pcdvq") for row in ours]
    points += [point(row, "other projects") for row in rows if "error" not in row]
    points.sort(key=lambda point: point.kl_mean)
    originals = {"SmolLM2-135M-Instruct": measured[0]["perplexity_original"]} if measured else {}
    title = (
        f"SmolLM2-135M-Instruct, {text}, {quality.WINDOWS} windows of {quality.CONTEXT} tokens\n"
        f"(windows x tokens of {calibration_text} that the method was calibrated on)"
    )
    table = Table(*HEADINGS, title=title, title_justify="left")
    for cells in point_rows(points, originals):
        table.add_row(*cells)
    console = Console(width=140)
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"{row['peer']}: {row['error']}", markup=False)
    if points:
        plot_quality(points, originals, title, file.with_suffix(".png"))


def write(file: Path, rows: list[dict[str, Any]], texts: Texts) -> None:
    name = texts.calibration_name(CALIBRATION)
    content = {
        "model": "SmolLM2-135M-Instruct (Q4_1 decoded to bf16)",
        "text": texts.evaluation_name,
        "calibration_text": name,
        "protocol": f"that of benchmarks/quality.py; calibration on {SAMPLES} windows of {LENGTH} tokens of {name}, seed 0",
        "command": "python benchmarks/compare_peers.py",
        "rows": rows,
    }
    write_text(file, json.dumps(content, indent=2) + "\n")


def run_all(peers: list[Peer], args: argparse.Namespace, texts: Texts, rows: list[dict[str, Any]]) -> None:
    """Measure peers; put the row of each into `rows`, in place of an older one, and write the file after it."""
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        try:
            reference = quality.Reference(Path(folder), texts)
            source = prepare(args.work, reference, texts)
        except (ImportError, OSError, ValueError) as error:
            sys.exit(f"compare_peers.py: {error}")
        for peer in peers:
            row = measure(peer, source, reference, args)
            rows[:] = [other for other in rows if other["peer"] != peer.name] + [row]
            write(args.out, rows, texts)
            print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rows that are in it are kept")
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".peers", help="environments and logs (default: %(default)s)"
    )
    parser.add_argument("--only", action="append", metavar="TEXT", help="rows whose name contains this; repeatable")
    add_text_options(parser)
    parser.add_argument(
        "--timeout", type=float, default=7200, help="seconds for each step of a peer (default: %(default)s)"
    )
    parser.add_argument("--table", action="store_true", help="print and plot the rows of the file, compute nothing")
    parser.add_argument("--timed", action="store_true", help="nothing else runs on this machine: record the seconds")
    args = parser.parse_args()
    args.work = args.work.resolve()
    texts = texts_of(parser, args)
    names = {"text": texts.evaluation_name, "calibration_text": texts.calibration_name(CALIBRATION)}
    content = read_results(args.out, None if args.table else names)
    rows = content["rows"]
    if args.table:
        show(args.out, rows, content["text"], content["calibration_text"])
        return
    done = {row["peer"] for row in rows if "error" not in row}
    wanted = [peer for peer in PEERS if not args.only or any(part in peer.name for part in args.only)]
    wanted = [peer for peer in wanted if peer.name not in done]
    if wanted:
        run_all(wanted, args, texts, rows)
    show(args.out, rows, *names.values())


if __name__ == "__main__":
    main()
