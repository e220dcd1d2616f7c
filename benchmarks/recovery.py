"""How far recovery gets, and how long a step takes: a packed model is recovered once for every combination of the rates,
steps and batches that are given. One JSON file holds the training and held-out curves of all of them.

    python benchmarks/recovery.py packed original --train c4.txt --learning-rate 1e-3 5e-3 --steps 100 --out recovery.json

Files that end in .pt hold windows of tokens, int64 [n, L], as `torch.save` writes them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_pcdvq import Recovery, recover
from hf_pcdvq.evaluation.metrics import evaluate, token_windows
from hf_pcdvq.files.records import device_name, package_versions, write_text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path, help="folder of the packed model")
    parser.add_argument("teacher", type=Path, help="folder of its original")
    parser.add_argument(
        "--train", type=Path, help="text or windows to train on (default: text that the original writes)"
    )
    parser.add_argument("--held-out", type=Path, help="text or windows to judge on (default: the package's)")
    parser.add_argument(
        "--text", type=Path, help="also compare the models on the first windows of this text afterwards"
    )
    parser.add_argument("--windows", type=int, default=48, help="how many (default: %(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="of how many tokens (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[Recovery.learning_rate])
    parser.add_argument("--steps", type=int, nargs="+", default=[Recovery.steps])
    parser.add_argument("--batch", type=int, nargs="+", default=[Recovery.batch])
    parser.add_argument(
        "--length", type=int, default=Recovery.length, help="tokens per window (default: %(default)s)"
    )
    parser.add_argument("--evaluations", type=int, default=Recovery.evaluations, help="default: %(default)s")
    parser.add_argument("--patience", type=int, default=Recovery.patience, help="default: %(default)s")
    parser.add_argument("--held-out-windows", type=int, default=Recovery.held_out, help="default: %(default)s")
    parser.add_argument("--micro-batch", type=int, help="windows that pass through the models at once")
    parser.add_argument("--cache-bytes", type=int, help="of the original's logits to keep on disk, with --work-dir")
    parser.add_argument("--work-dir", type=Path, help="folder for states and logits (default: none are kept)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, help="default: the accelerator, if there is one")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--save", type=Path, help="folder for the recovered model of the last combination")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    return parser.parse_args()


def data(file: Path | None) -> Any:
    return torch.load(file) if file is not None and file.suffix == ".pt" else file


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")


def measured(
    args: argparse.Namespace, teacher: PreTrainedModel, settings: Recovery
) -> tuple[dict[str, Any], PreTrainedModel]:
    """The row of one combination, and its model."""
    model, tokenizer = load(args.packed), AutoTokenizer.from_pretrained(args.teacher)
    report = recover(
        model,
        teacher,
        tokenizer,
        data(args.train),
        held_out=data(args.held_out),
        settings=settings,
        device=args.device,
        work_dir=args.work_dir,
        restart=True,
    )
    row = report.to_dict()
    if args.text is not None:
        with args.text.open(encoding="utf-8", newline="") as stream:
            windows = token_windows(tokenizer, stream.read(), args.context, args.windows)
        row["evaluation"] = evaluate(
            teacher.to(args.device), model.to(args.device), windows, progress=False
        ).to_dict()
    return row, model


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device is None:
        args.device = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        )
    teacher, rows = load(args.teacher), []
    for rate, steps, batch in itertools.product(args.learning_rate, args.steps, args.batch):
        settings = Recovery(
            steps=steps,
            batch=batch,
            length=args.length,
            learning_rate=rate,
            held_out=args.held_out_windows,
            evaluations=args.evaluations,
            patience=args.patience,
            micro_batch=args.micro_batch,
            cache_bytes=args.cache_bytes,
            seed=args.seed,
        )
        row, model = measured(args, teacher, settings)
        rows.append(row)
        shown, pace = row.get("evaluation", row["after"]), row["seconds_per_step"]
        print(
            f"rate {rate:g}, {steps} steps of {batch}: held-out KL {row['before']['kl_mean']:.4f} -> "
            f"{row['after']['kl_mean']:.4f}; perplexity {shown['perplexity_packed']:.2f} (original "
            f"{shown['perplexity_original']:.2f}), KL {shown['kl_mean']:.4f}; "
            f"{'all steps were done before' if pace is None else f'{pace:.3f} s per step'}",
            flush=True,
        )
        content = {
            "packed": args.packed.name,
            "device": device_name(args.device),
            "versions": package_versions(),
            "rows": rows,
        }
        write_text(args.out, json.dumps(content, indent=1) + "\n")
    if args.save is not None:
        model.save_pretrained(args.save)


if __name__ == "__main__":
    main()
