#!/usr/bin/env python3
"""The tables of the PCDVQ and CCQ papers: perplexity at contexts of 2048 and 4096, and five zero-shot tasks.

Quantizes LLaMA-2-7B, LLaMA-3-8B and Mistral-7B from the Hub with calibration, and compares each with its original in
the same run. For the first two you must accept a license on the Hub and run `hf auth login`. Rows that are in the output
file are not computed again; packed models are kept in --work. See docs/reproduce.md for what to expect.

    python benchmarks/reproduce_paper.py --out reproduction.json
    python benchmarks/reproduce_paper.py --out reproduction.json --models mistralai/Mistral-7B-v0.1 --settings "pcdvq-2.25"
    python benchmarks/reproduce_paper.py --out smoke.json --smoke      # two blocks of SmolLM2-135M-Instruct: a minute
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from smollm2 import save_smollm2
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_pcdvq import Calibration, quantize_model
from hf_pcdvq.config import config_of_setting
from hf_pcdvq.evaluation.metrics import evaluate, token_windows
from hf_pcdvq.evaluation.tasks import run_tasks, task_manager, wikitext2
from hf_pcdvq.files.folders import folder_in_place
from hf_pcdvq.files.records import device_name, package_versions, write_text
from hf_pcdvq.files.size import count_folder

ROOT = Path(__file__).resolve().parent.parent
MODELS = ["meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B", "mistralai/Mistral-7B-v0.1"]
SETTINGS = ("pcdvq-2.0", "pcdvq-2.25", "ccq-2.0625", "ccq-2.5", "ccq-2.75", "stream-2.0")


@dataclass(frozen=True)
class Plan:
    """What is measured, and on how much data."""

    contexts: tuple[int, ...] = (2048, 4096)
    windows: int | None = None  # at each context; None takes the whole test text
    text: Path | None = None  # None takes WikiText-2 from the Hub
    tasks: tuple[str, ...] = ("arc_challenge", "arc_easy", "hellaswag", "piqa", "winogrande")
    task_dir: Path | None = None
    limit: int | None = None
    calibration: Calibration = Calibration(dataset="allenai/c4:en", samples=128, length=2048, holdout=0)


SMOKE = Plan(
    contexts=(64, 128),
    windows=2,
    text=ROOT / "scripts" / "data" / "sample_text.txt",
    tasks=("local_piqa", "local_arc_easy"),
    task_dir=ROOT / "benchmarks" / "eval_tasks",
    limit=3,
    calibration=Calibration(
        dataset=str(ROOT / "scripts" / "data" / "sample_text.txt"), samples=2, length=64, holdout=0
    ),
)
SMOKE_BLOCKS = 2  # of SmolLM2's thirty: enough to run everything, too few to predict anything


def smollm2(work: Path) -> str:
    """A folder with the first blocks of SmolLM2-135M-Instruct, created unless an earlier run has done so."""
    folder = work / f"SmolLM2-135M-Instruct-{SMOKE_BLOCKS}-blocks"
    if not folder.is_dir():
        with folder_in_place(folder.resolve(), work, force=False) as partial:
            save_smollm2(partial)
            config = AutoConfig.from_pretrained(partial)
            config.num_hidden_layers = SMOKE_BLOCKS
            AutoModelForCausalLM.from_pretrained(partial, config=config).save_pretrained(partial)
    return str(folder)


def load(model: str | Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", device_map="auto" if torch.accelerator.is_available() else None
    )


def packed_folder(model: str, setting: str, plan: Plan, work: Path) -> Path:
    """The packed model, quantized unless an earlier run has done so."""
    name = f"{Path(model).name}-{setting}"
    folder = (work / name).resolve()
    if folder.is_dir():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(model)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    config = config_of_setting(setting)
    config.calibration = plan.calibration
    packed = quantize_model(dense, tokenizer, config, work_dir=work / f".{name}")
    with folder_in_place(folder, Path(model), force=False) as partial:
        packed.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


def measure(model: str, setting: str, plan: Plan, work: Path) -> dict[str, Any]:
    """One row: sizes, quality figures at every context, and the scores of both models in every task."""
    manager = task_manager(plan.tasks, plan.task_dir)
    text = wikitext2() if plan.text is None else plan.text.read_bytes().decode("utf-8")
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = {context: token_windows(tokenizer, text, context, plan.windows) for context in plan.contexts}
    folder = packed_folder(model, setting, plan, work)
    count = count_folder(folder)
    packed, original = load(folder), load(model)
    metrics = {str(context): evaluate(original, packed, cut).to_dict() for context, cut in windows.items()}
    scores = [run_tasks(part, tokenizer, plan.tasks, manager, plan.limit) for part in (original, packed)]
    tasks = [
        {"task": task, "metric": metric, "original": asdict(score), "packed": asdict(scores[1][task, metric])}
        for (task, metric), score in scores[0].items()
    ]
    return {
        "model": model,
        "setting": setting,
        "bits_per_packed_weight": count.bits_per_packed_weight,
        "bits_per_parameter": count.bits_per_parameter,
        "calibration": plan.calibration.to_dict(),
        "metrics": metrics,
        "tasks": tasks,
        "device": device_name(packed.device),
        "versions": package_versions(),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Every cell holds the figures of the original and the packed model."""
    contexts = list(rows[0]["metrics"])
    tasks = [task["task"] for task in rows[0]["tasks"] if task["metric"] == "acc"]
    shown = Table("model", "setting", "bits", title="original / packed", title_justify="left")
    for heading in (*(f"perplexity, {context}" for context in contexts), *tasks):
        shown.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        cells = [
            f"{figures['perplexity_original']:,.2f} / {figures['perplexity_packed']:,.2f}"
            for figures in row["metrics"].values()
        ]
        cells += [
            f"{100 * task['original']['mean']:.1f} / {100 * task['packed']['mean']:.1f}"
            for task in row["tasks"]
            if task["metric"] == "acc"
        ]
        shown.add_row(Path(row["model"]).name, row["setting"], f"{row['bits_per_packed_weight']:.3f}", *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rows that are in it are kept")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "work", help="folder for packed models (default: %(default)s)"
    )
    parser.add_argument(
        "--models", nargs="+", metavar="MODEL", help="folders or names on the Hub (default: the papers')"
    )
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, metavar="SETTING", help=f"of {', '.join(SETTINGS)}"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="a test run without the Hub: little data, two blocks of SmolLM2-135M-Instruct",
    )
    args = parser.parse_args()
    logging.getLogger("hf_pcdvq").setLevel(logging.ERROR)  # its summary of what was left as it was
    args.work.mkdir(parents=True, exist_ok=True)
    plan = SMOKE if args.smoke else Plan()
    models = args.models or ([smollm2(args.work)] if args.smoke else MODELS)
    settings = args.settings or (["pcdvq-2.25"] if args.smoke else list(SETTINGS))
    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else []
    for model in models:
        for setting in settings:
            if any((row["model"], row["setting"]) == (model, setting) for row in rows):
                continue
            rows.append(measure(model, setting, plan, args.work))
            write_text(args.out, json.dumps(rows, indent=2) + "\n")
    Console().print(table(rows))


if __name__ == "__main__":
    main()
