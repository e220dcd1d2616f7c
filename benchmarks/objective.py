#!/usr/bin/env python3
"""What options of the calibration are worth, over several draws of the calibration text.

`prepare` tokenizes the texts into one file, so that `run` needs neither texts nor a tokenizer nor a network, and can run on
a machine that has nothing but the model's folder and that file:

    python benchmarks/objective.py prepare --model MODEL --out tokens.safetensors
    python benchmarks/objective.py run --model MODEL --tokens tokens.safetensors --out objective.json --jobs 4 --seconds 400

All variants see the same draws: 128 windows of 1024 tokens each, by seeds 0, 1 and 2. Perplexity, KL divergence and top-1
agreement over the first 48 windows of 1024 tokens of the WikiText-2 test text, as in quality.py, and KL over others: code of
Python's library, and with --answers what the original answers to prompts about chat, tools and code. Runs that are in the
output file are not computed again; the first draw of every variant comes before the second. The model itself writes the
texts "own", from random tokens, and "answers", to other prompts than those of the evaluation. `--table` prints the file.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import Lock, local
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from texts import ON_HUB, Texts
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_pcdvq import Calibration, quantize_model
from hf_pcdvq.calibration.data import read_windows
from hf_pcdvq.calibration.sampling import sample_answers, sample_from_model
from hf_pcdvq.config import config_of_setting
from hf_pcdvq.evaluation.metrics import Evaluation, compare_logits, token_windows
from hf_pcdvq.files.records import device_name, package_versions, write_text

LENGTH, SAMPLES, DRAWS, WINDOWS, FEW_WINDOWS = 1024, 128, 3, 48, 12
SETTINGS = ("pcdvq-2.25", "stream-2.0")
OWN, ANSWERS = "own", "answers"  # texts that the model writes
PROMPTS = Path(__file__).with_name("prompts.jsonl")  # each with its kind
KINDS = ("chat", "tool", "code")  # of prompts whose answers are evaluated on
# By name: fields of Calibration, and fields of the config.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "own share": ({"correction": "own"}, {}),
    "fisher 4": ({"fisher_groups": 4}, {}),
    "own share, fisher 4": ({"correction": "own", "fisher_groups": 4}, {}),
    "sweeps 2": ({"sweeps": 2}, {}),
    "tuned 2": ({"tune_steps": 2}, {}),
    "tuned 4": ({"tune_steps": 4}, {}),
    "window 14": ({}, {"window_bits": 14}),
    "window 16": ({}, {"window_bits": 16}),
}


class Run(NamedTuple):
    """One quantization: a setting, a variant of its options, and a draw of a text."""

    setting: str
    variant: str
    text: str
    draw: int

    @property
    def possible(self) -> bool:
        """Only `stream` has windows of bits."""
        return self.setting.startswith("stream") or "window_bits" not in VARIANTS[self.variant][1]


class Bench:
    """The original model, its logits on the evaluation windows, and the calibration windows, on one device."""

    def __init__(self, folder: Path, tokens: dict[str, torch.Tensor], args: argparse.Namespace):
        self.device = torch.device(args.device)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(self.device)
        if args.blocks:
            del self.model.model.layers[args.blocks :]
            self.model.config.num_hidden_layers = args.blocks
        self._calibration = {name: tensor for name, tensor in tokens.items() if not name.startswith("test.")}
        self._samples = args.samples
        self._folder, self._save = folder, args.save
        self._tests = {
            name.removeprefix("test."): tensor[: args.windows].long()
            for name, tensor in tokens.items()
            if name.startswith("test.")
        }
        if args.answers:
            self._tests |= {f"{kind} answers": self._held_out(kind, args.windows) for kind in KINDS}
        self._logits = {name: list(window_logits(self.model, windows)) for name, windows in self._tests.items()}
        self._thread = local()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def windows(self, text: str, draw: int) -> torch.Tensor:
        name = f"{text}.{draw}"
        if name not in self._calibration:
            with self._stream():
                self._calibration[name] = self._written(text, draw)
        return self._calibration[name][: self._samples].long()

    def _written(self, text: str, draw: int) -> torch.Tensor:
        """A draw of a text that the model writes."""
        if text == OWN:
            return sample_from_model(self.model, self._samples, LENGTH, draw, progress=False)
        if text == ANSWERS:
            return sample_answers(self.model, self._prompts(0), self._samples, LENGTH, draw, progress=False)
        sys.exit(f"objective.py: the tokens hold no draw {draw} of {text!r}, only {', '.join(self._calibration)}")

    def _held_out(self, kind: str, windows: int) -> torch.Tensor:
        """Answers to prompts of a kind that are not calibrated on."""
        count = min(FEW_WINDOWS, windows)
        return sample_answers(self.model, self._prompts(1, kind), count, LENGTH, DRAWS, progress=False)

    def _prompts(self, half: int, kind: str | None = None) -> list[list[int]]:
        """Token ids of every second prompt, of one kind or of all, in the chat template, up to where the answer begins."""
        tokenizer = AutoTokenizer.from_pretrained(self._folder)
        if tokenizer.chat_template is None:
            sys.exit(f"objective.py: answering prompts needs a chat template, and {self._folder} has none")
        lines = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()][half::2]
        texts = [
            tokenizer.apply_chat_template(line["messages"], add_generation_prompt=True, tokenize=False)
            for line in lines
            if kind in (None, line["kind"])
        ]
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def measure(self, run: Run) -> dict[str, Any]:
        """Quantize and evaluate, on a stream of its own, so that several runs share a GPU."""
        with self._stream():
            options, fields = VARIANTS[run.variant]
            windows = self.windows(run.text, run.draw)
            calibration = Calibration(samples=len(windows), length=LENGTH, holdout=0, seed=run.draw, **options)
            config = config_of_setting(run.setting, **fields, calibration=calibration)
            model = copy.deepcopy(self.model)
            start = time.perf_counter()
            quantize_model(model, None, config, windows, device=self.device, progress=False)
            seconds = time.perf_counter() - start
            report = model.hf_quantizer.report
            if self._save is not None:
                model.save_pretrained(self._save / "-".join(map(str, run)).replace(" ", "_"))
            dense = model.dequantize(torch.bfloat16)
            found = {name: self._compare(dense, name) for name in self._tests}
        return {
            **run._asdict(),
            "seconds": round(seconds, 1),
            "output_error_last_block": report.blocks[-1].output_error,
            **{name: evaluation.to_dict() for name, evaluation in found.items()},
        }

    def _stream(self) -> AbstractContextManager:
        """The CUDA stream of this thread, whose memory later runs on it use again."""
        if self.device.type != "cuda":
            return nullcontext()
        if not hasattr(self._thread, "stream"):
            self._thread.stream = torch.cuda.Stream()
        return torch.cuda.stream(self._thread.stream)

    def _compare(self, model: PreTrainedModel, test: str) -> Evaluation:
        windows = self._tests[test]
        return compare_logits(zip(self._logits[test], window_logits(model, windows)), windows, progress=False)


def window_logits(model: PreTrainedModel, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the logits `[L - 1, vocabulary]` of each window of `windows` `[n, L]`, on the model's device."""
    for window in windows:
        with torch.no_grad():
            yield model(input_ids=window[None].to(model.device), use_cache=False).logits[0, :-1]


def prepare(args: argparse.Namespace) -> None:
    """Write the evaluation windows and the draws of every text as int32 `[n, L]`."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = Texts()
    library = Path(sysconfig.get_path("stdlib"))
    code = "\n".join(file.read_text(encoding="utf-8") for file in sorted(library.glob("[a-d]*.py")))
    tokens = {
        "test.wikitext2": token_windows(tokenizer, texts.evaluation_text(), LENGTH, WINDOWS),
        "test.code": token_windows(tokenizer, code, LENGTH, FEW_WINDOWS),
    }
    for text in ON_HUB:
        for draw in range(DRAWS):
            tokens[f"{text}.{draw}"] = read_windows(texts.calibration_data(text), tokenizer, SAMPLES, LENGTH, draw)
    save_file({name: windows.int().contiguous() for name, windows in tokens.items()}, args.out)
    print(", ".join(f"{name} {list(windows.shape)}" for name, windows in tokens.items()))


def run(args: argparse.Namespace) -> None:
    """Measure what is asked for and missing, `args.jobs` at a time, and write the file after each."""
    started = time.perf_counter()
    logging.getLogger("hf_pcdvq").setLevel(logging.ERROR)
    rows = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    done = {Run(*(row[field] for field in Run._fields)) for row in rows}
    wanted = [
        Run(setting, variant, text, draw)
        for draw in args.draw
        for text in args.text
        for variant in args.variant
        for setting in args.setting
    ]
    wanted = [run for run in wanted if run.possible and run not in done]
    bench = Bench(args.model, load_file(args.tokens), args)
    lock, threads = Lock(), torch.get_num_threads()

    def measure(run: Run) -> None:
        torch.set_num_threads(max(1, threads // args.jobs))
        if args.seconds and time.perf_counter() - started > args.seconds:
            return
        row = bench.measure(run)
        with lock:
            rows.append(row)
            write(args.out, rows, bench, args)
            print(json.dumps(row), flush=True)

    for run in wanted[:1]:  # alone, since it compiles what the others find in the cache
        measure(run)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda drawn: bench.windows(*drawn), {(run.text, run.draw): None for run in wanted}))
        list(pool.map(measure, wanted[1:]))


def write(file: Path, rows: list[dict[str, Any]], bench: Bench, args: argparse.Namespace) -> None:
    content = {
        "model": args.model.name,
        "protocol": f"calibrated on {args.samples} windows of {LENGTH} tokens, evaluated on {args.windows}, bf16",
        "blocks": args.blocks or "all",
        "device": device_name(bench.device),
        "jobs": args.jobs,
        "versions": package_versions(),
        "command": "python benchmarks/objective.py run",
        "rows": rows,
    }
    write_text(file, json.dumps(content, indent=2) + "\n")


def table(rows: list[dict[str, Any]]) -> Table:
    """Mean over the draws and, in brackets, standard deviation, for every setting, text and variant."""
    shown = Table(title="mean (standard deviation) over the draws", title_justify="left")
    others = [name for name in ("code", *(f"{kind} answers" for kind in KINDS)) if all(name in row for row in rows)]
    figures = ("draws", "perplexity", "KL mean", "KL 90 %", "top 1", *(f"KL {name}" for name in others), "s")
    for heading in ("setting", "text", "variant", *figures):
        shown.add_column(heading, justify="left" if heading in ("setting", "text", "variant") else "right")
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["setting"], row["text"], row["variant"]), []).append(row)
    for key, group in sorted(groups.items()):

        def over(test: str, field: str, digits: int, group: list = group) -> str:
            figures = [row[test][field] for row in group]
            spread = statistics.stdev(figures) if len(figures) > 1 else float("nan")
            return f"{statistics.mean(figures):.{digits}f} ({spread:.{digits}f})"

        fields = (("perplexity_packed", 2), ("kl_mean", 4), ("kl_p90", 3), ("top1_agreement", 4))
        means = [over("wikitext2", field, digits) for field, digits in fields]
        seconds = statistics.mean(row["seconds"] for row in group)
        shown.add_row(*key, str(len(group)), *means, *(over(name, "kl_mean", 4) for name in others), f"{seconds:.0f}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare", help="tokenize the texts")
    second = commands.add_parser("run", help="quantize and evaluate")
    for command in (first, second):
        command.add_argument("--model", type=Path, required=True, help="folder of the original")
        command.add_argument("--out", type=Path, required=True)
    second.add_argument("--tokens", type=Path, required=True, help="the file that `prepare` wrote")
    for name, choices in (("setting", SETTINGS), ("variant", tuple(VARIANTS))):
        second.add_argument(f"--{name}", nargs="+", choices=choices, default=choices)
    second.add_argument("--text", nargs="+", default=["c4"], help=f"{', '.join(ON_HUB)}, {OWN} or {ANSWERS}")
    second.add_argument("--answers", action="store_true", help="evaluate on answers of the original, too")
    second.add_argument("--draw", nargs="+", type=int, default=list(range(DRAWS)))
    second.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    second.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a thread")
    second.add_argument("--save", type=Path, help="folder for a folder with the packed model of every run")
    second.add_argument("--seconds", type=float, help="start no run later than this")
    second.add_argument("--samples", type=int, default=SAMPLES, help="windows to calibrate on")
    second.add_argument("--windows", type=int, default=WINDOWS, help="windows to evaluate on, of each text")
    second.add_argument("--blocks", type=int, help="keep only so many decoder blocks, to try this program")
    second.add_argument("--table", action="store_true", help="print the file and compute nothing")
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args)
        return
    if not args.table:
        run(args)
    Console(width=160).print(table(json.loads(args.out.read_text())["rows"]))


if __name__ == "__main__":
    main()
