#!/usr/bin/env python3
"""Quality of every setting on SmolLM2-135M-Instruct, calibrated, always by the same protocol.

Perplexity, KL divergence and top-1 agreement over the first 48 windows of 1024 tokens of the WikiText-2 test text, with
all linear layers of the decoder blocks quantized; bits are counted on the saved files. Rows that are in the output file
are not computed again, so an interrupted run can be resumed.

Texts come from ../shared/data where that folder exists, otherwise from the Hub; --text and --dataset replace them by
files of your own. Calibration texts from the Hub are not the excerpts in ../shared/data, so their figures are not those
of docs/quality.md.

    python benchmarks/quality.py --out benchmarks/results/quality_smollm2.json                  # all rows: hours
    python benchmarks/quality.py --out benchmarks/results/quality_smollm2.json --only "pcdvq-2.25, c4"
    python benchmarks/quality.py --out benchmarks/results/quality_smollm2.json --table          # prints the file
    python benchmarks/quality.py --out mine.json --only "pcdvq-2.25, c4" --text mine.txt --dataset other.txt

Dense and as a mixture of experts, on fewer tokens than the protocol has: half to calibrate on, a quarter to evaluate on.

    python benchmarks/quality.py --out benchmarks/results/mixture_smollm2.json --windows 12 --length 512 \\
        --only "pcdvq-2.25, wikitext2_train, 16 windows" --only "pcdvq-2.25, wikitext2_train, 16 windows, as 8 experts"
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.table import Table
from smollm2 import save_smollm2
from texts import Texts, add_text_options, read_results, texts_of
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from hf_pcdvq import Calibration, quantize_model
from hf_pcdvq.config import config_of_setting
from hf_pcdvq.emulation import is_emulated
from hf_pcdvq.evaluation.metrics import compare_logits, token_windows
from hf_pcdvq.files.records import write_text
from hf_pcdvq.files.size import count_folder

CONTEXT, WINDOWS = 1024, 48
SETTINGS = (
    *("pcdvq-2.25", "pcdvq-2.0", "ccq-2.75", "ccq-2.5", "ccq-2.0625"),
    *("stream-2.0", "stream-2.25", "stream-2.5"),
)
UNROTATED = ("ccq-2.75-published", "ccq-2.5-published", "ccq-2.0625-published")


class Row(NamedTuple):
    """One run: a setting, and how it is calibrated."""

    setting: str
    text: str | None  # see `texts.ON_HUB`; None for text that the model generates itself
    samples: int
    options: dict[str, Any] = {}  # fields of Calibration
    config: dict[str, Any] = {}  # fields of the config
    experts: int = 0  # cut every MLP into so many experts; 0 leaves the model dense

    @property
    def name(self) -> str:
        changes = [f"{key} {value}" for key, value in {**self.options, **self.config}.items()]
        changes += [f"as {self.experts} experts"] if self.experts else []
        return ", ".join([self.setting, self.text or "own text", f"{self.samples} windows", *changes])

    def calibrated_on(self, texts: Texts) -> Row:
        """The row as it is recorded: with the text that it is really calibrated on."""
        return self if self.text is None else self._replace(text=texts.calibration_name(self.text))


FULL, LESS, LEAST = 128, 32, 16  # windows to calibrate on
PROBE = "pcdvq-2.25"  # the setting of the rows about seeds, text and options
PROJECTION = {"magnitude": "projection"}
ROWS = [
    *(Row(setting, "wikitext2_train", FULL) for setting in SETTINGS),
    *(Row(setting, "c4", FULL) for setting in SETTINGS),
    Row(PROBE, "wikitext2_train", FULL, {"sweeps": 0}),
    Row(PROBE, "wikitext2_train", FULL, {}, PROJECTION),
    Row(PROBE, "wikitext2_train", FULL, {"sweeps": 0}, PROJECTION),
    Row(PROBE, "wikitext2_train", FULL, {"refit": False}, PROJECTION),
    Row(PROBE, "wikitext2_train", FULL, {"sweeps": 0, "refit": False}, PROJECTION),
    Row("pcdvq-2.0", "wikitext2_train", FULL, {}, PROJECTION),
    Row("ccq-2.75", "wikitext2_train", FULL, {"sweeps": 0}),
    Row("stream-2.0", "wikitext2_train", FULL, {"sweeps": 0}),
    Row(PROBE, "wikitext2_train", LEAST),
    Row(PROBE, "wikitext2_train", LEAST, {}, PROJECTION),
    Row(PROBE, "wikitext2_train", LEAST, {"sweeps": 0}, PROJECTION),
    Row(PROBE, "wikitext2_train", LEAST, {"desc_act": False}, PROJECTION),
    Row(PROBE, "wikitext2_train", LEAST, {"correction": 0.0}, PROJECTION),
    Row(PROBE, "wikitext2_train", LEAST, {"refit": False}, PROJECTION),
    Row(PROBE, "wikitext2_train", LEAST, {"seed": 1}, PROJECTION),
    Row(PROBE, None, LEAST, {}, PROJECTION),
    Row(PROBE, "wikitext2_train", LEAST, {"seed": 1}),
    Row(PROBE, None, LEAST),
    Row(PROBE, "wikitext2_train", LEAST, experts=8),
    *(Row(setting, "wikitext2_train", LEAST) for setting in UNROTATED),
    *(Row(setting, "wikitext2_train", LESS) for setting in SETTINGS if not setting.startswith("pcdvq")),
]


class Reference:
    """The original model: its folder, the evaluation windows, and its logits on them, kept in files.

    Args:
        folder: where the model and the logits are written.
        texts: where the evaluation text comes from.
        windows: how many windows to evaluate, at most.

    Raises:
        ImportError, OSError, ValueError: the evaluation text cannot be loaded, or is shorter than one window.
    """

    def __init__(self, folder: Path, texts: Texts, windows: int = WINDOWS):
        text = texts.evaluation_text()
        self.folder = folder / "model"
        save_smollm2(self.folder)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.windows = token_windows(self.tokenizer, text, CONTEXT, windows)
        self._logits = folder / "logits"
        self._logits.mkdir()
        # Models and matrix products are bf16, unless this CPU only emulates bf16.
        self.emulated = is_emulated(torch.bfloat16, torch.device("cpu"))
        for number, logits in enumerate(window_logits(self.upcast(self.load()), self.windows)):
            torch.save(logits, self._logits / f"{number}.pt")

    def upcast(self, model: PreTrainedModel) -> PreTrainedModel:
        """In float32 if bf16 is emulated. Otherwise unchanged: `.to(bf16)` would round the rotary frequencies."""
        return model.float() if self.emulated else model

    def load(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.folder)

    def logits(self) -> Iterator[torch.Tensor]:
        for number in range(len(self.windows)):
            yield torch.load(self._logits / f"{number}.pt")


def as_mixture(model: PreTrainedModel, experts: int) -> MixtralForCausalLM:
    """The same function in Mixtral's layout: each MLP's neurons are split over experts, and every token uses all experts.

    The router is zero, so every expert has the weight 1 / experts, for which the down projections compensate.
    """
    fields = {key: getattr(model.config, key, None) for key in MixtralConfig().to_dict()}
    sizes = {"intermediate_size": model.config.intermediate_size // experts}
    routing = {"num_local_experts": experts, "num_experts_per_tok": experts, "architectures": ["MixtralForCausalLM"]}
    kept = {key: value for key, value in fields.items() if value is not None and key != "model_type"}
    mixture = MixtralForCausalLM(MixtralConfig(**{**kept, **sizes, **routing})).to(model.dtype).eval()
    weights = {key: value for key, value in model.state_dict().items() if ".mlp." not in key}
    for number, layer in enumerate(model.model.layers):
        name = f"model.layers.{number}.mlp"
        gate, up, down = (getattr(layer.mlp, part).weight for part in ("gate_proj", "up_proj", "down_proj"))
        halves = [half.view(experts, -1, half.shape[1]) for half in (gate, up)]
        weights[f"{name}.gate.weight"] = torch.zeros(experts, gate.shape[1], dtype=model.dtype)
        weights[f"{name}.experts.gate_up_proj"] = torch.cat(halves, dim=1)
        weights[f"{name}.experts.down_proj"] = experts * down.view(len(down), experts, -1).transpose(0, 1)
    mixture.load_state_dict(weights)
    return mixture


@torch.inference_mode()
def window_logits(model: PreTrainedModel, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the logits `[L - 1, vocabulary]` of each window of `windows` `[n, L]`, in the model's dtype."""
    for window in windows:
        yield model(input_ids=window[None], use_cache=False).logits[0, :-1]


def measure(row: Row, reference: Reference, texts: Texts, length: int, timed: bool) -> dict[str, Any]:
    """Quantize on windows of `length` tokens, save, count, evaluate."""
    calibration = Calibration(samples=row.samples, length=length, holdout=0, **row.options)
    data = None if row.text is None else texts.calibration_data(row.text)
    model = reference.load()
    if row.experts:
        model = as_mixture(model, row.experts)
    start = time.perf_counter()
    quantize_model(
        model, reference.tokenizer, config_of_setting(row.setting, **row.config, calibration=calibration), data
    )
    seconds = time.perf_counter() - start
    report = model.hf_quantizer.report
    recorded = row.calibrated_on(texts)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        count = count_folder(Path(folder))
    # Decoded once: the packed layers would decode their weights for every window.
    dense = reference.upcast(model.dequantize(torch.bfloat16))
    result = compare_logits(zip(reference.logits(), window_logits(dense, reference.windows)), reference.windows)
    return {
        "row": recorded.name,
        "setting": row.setting,
        "calibration": {
            "text": recorded.text or "own",
            "tokens": report.windows * report.length,
            **calibration.to_dict(),
        },
        "config": row.config,
        "bits_counted": count.bits_per_packed_weight,
        "bits_whole_file": count.bits_per_parameter,
        "arithmetic": "float32" if reference.emulated else "bfloat16",
        "seconds_to_quantize": round(seconds, 1) if timed else None,
        **result.to_dict(),
        "output_error_last_block": report.blocks[-1].output_error,
        "notes": sorted({layer.note for layer in report.layers if layer.note}),
    }


def table(rows: list[dict[str, Any]], text: str) -> Table:
    shown = Table(title=f"SmolLM2-135M-Instruct, {text}, windows of {CONTEXT} tokens", title_justify="left")
    shown.add_column("row", overflow="fold")
    for heading in ("bits", "perplexity", "KL mean", "KL 90 %", "top 1", "seconds"):
        shown.add_column(heading, justify="right")
    if rows:
        shown.add_row("original", "16", f"{rows[0]['perplexity_original']:.2f}", "", "", "", "")
    for row in rows:
        figures = [f"{row['bits_counted']:.3f}", f"{row['perplexity_packed']:,.2f}", f"{row['kl_mean']:.3f}"]
        figures += [
            f"{row['kl_p90']:.3f}",
            f"{100 * row['top1_agreement']:.1f} %",
            f"{row['seconds_to_quantize']:.0f}" if row["seconds_to_quantize"] else "-",
        ]
        shown.add_row(row["row"], *figures)
    return shown


def write(file: Path, rows: list[dict[str, Any]], text: str) -> None:
    content = {
        "model": "SmolLM2-135M-Instruct (Q4_1 decoded to bf16)",
        "text": text,
        "protocol": f"{text}, first {rows[0]['windows']} windows of {CONTEXT} tokens, bf16 models, float32 comparison",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": "python benchmarks/quality.py",
        "rows": rows,
    }
    write_text(file, json.dumps(content, indent=2) + "\n")


def chosen(only: list[str] | None) -> list[Row]:
    """The rows that are asked for: for each entry of `only` the row of that name, or else all whose name contains it."""
    names = {row.name for row in ROWS}
    parts = only or [""]
    return [row for row in ROWS if any(row.name == part if part in names else part in row.name for part in parts)]


def run(args: argparse.Namespace, texts: Texts, rows: list[dict[str, Any]]) -> None:
    """Compute the rows that are asked for and missing; append each to `rows` and write the file after it."""
    torch.set_num_threads(args.threads)
    logging.getLogger("hf_pcdvq").setLevel(logging.ERROR)
    done = {row["row"] for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        try:
            reference = Reference(Path(folder), texts, args.windows)
        except (ImportError, OSError, ValueError) as error:
            sys.exit(f"quality.py: {error}")
        for row in chosen(args.only):
            name = row.calibrated_on(texts).name
            if name in done:
                continue
            done.add(name)
            rows.append(measure(row, reference, texts, args.length, not args.busy))
            write(args.out, rows, texts.evaluation_name)
            print(json.dumps(rows[-1]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rows that are in it are kept")
    parser.add_argument(
        "--only",
        action="append",
        metavar="TEXT",
        help="the row of this name, or those whose name contains it; repeatable",
    )
    add_text_options(parser)
    parser.add_argument("--table", action="store_true", help="print the rows of the file and compute nothing")
    parser.add_argument(
        "--windows", type=int, default=WINDOWS, help="windows to evaluate (default: %(default)s, the protocol)"
    )
    parser.add_argument(
        "--length",
        type=int,
        default=CONTEXT,
        help="tokens per calibration window (default: %(default)s, the protocol)",
    )
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--busy", action="store_true", help="other programs are running on this machine: record no seconds"
    )
    args = parser.parse_args()
    texts = texts_of(parser, args)
    content = read_results(args.out, None if args.table else {"text": texts.evaluation_name})
    rows = content["rows"]
    if args.table:
        Console(width=140).print(table(rows, content["text"]))
        return
    run(args, texts, rows)
    Console(width=140).print(table(rows, texts.evaluation_name))


if __name__ == "__main__":
    main()
