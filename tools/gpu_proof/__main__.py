"""Everything that only a GPU can prove, as one command for a machine with nothing but PyTorch and Triton.

Steps run in order of value, each in a process and within a time limit of its own; one that fails does not stop the
others. Results are written at once: `proof.json` says how each step ended, `log.txt` holds all output, and the
benchmarks write files of their own.

    python tools/gpu_proof --out results --wheels wheels     # on a GPU; the folder holds wheels that are missing there
    python tools/gpu_proof --out results --resume            # what failed, or was not reached
    python tools/gpu_proof --out rehearsal --dry-run         # without a GPU: tiny shapes in Triton's interpreter
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FORMATS = ("pcdvq-2.25", "ccq-2.5", "stream-2.0")
MODELS = ("Llama-3-8B", "Llama-3-70B")
DRY_FORMAT = "ccq-2.5"
DRY_TESTS = "tests/kernels/test_triton.py::test_products[ccq-2.5-3x64-3-float16]"


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: for `--steps` and `proof.json`.
        seconds: after which it is stopped; only for real, not in a dry run.
        command: from the folder for results and whether it is a dry run to the arguments of Python.
    """

    name: str
    seconds: int
    command: Callable[[Path, bool], list[str]]


@dataclass(frozen=True)
class Outcome:
    """How a step ended: `"passed"`, `"failed"` or `"stopped"` after its time limit."""

    ended: str
    seconds: float
    exit_status: int | None


def _own(script: str) -> Callable[[Path, bool], list[str]]:
    """A step that is a script beside this one."""
    return lambda out, dry: [str(HERE / script), "--out", str(out), *(["--dry-run"] if dry else [])]


def _tests(out: Path, dry: bool) -> list[str]:
    options = ["-p", "no:cacheprovider", "--tb=short", "--noconftest"]
    if dry:
        return ["-m", "pytest", *options, DRY_TESTS]
    files = ["tests/kernels/test_triton.py", "tests/kernels/test_cuda_graphs.py"]
    return ["-m", "pytest", *options, "-n", "12", "--maxfail=40", *files]


def _bench(file: str, *tokens: int) -> Callable[[Path, bool], list[str]]:
    def command(out: Path, dry: bool) -> list[str]:
        made = ["benchmarks/bench_kernels.py", "--peers", "--out", str(out / file)]
        if dry:
            return [*made, "--smoke", "--formats", DRY_FORMAT]
        return [*made, "--formats", *FORMATS, "--models", *MODELS, "--tokens", *map(str, tokens)]

    return command


def _generate(out: Path, dry: bool) -> list[str]:
    made = ["benchmarks/bench_generate.py", "--out", str(out / "generate.json")]
    if dry:
        return [*made, "--settings", DRY_FORMAT, "--runs", "1", "--new-tokens", "4", "--smoke"]
    return [*made, "--settings", *FORMATS, "--runs", "2"]


# In order of value: a later step is the first to go if time runs out.
STEPS = (
    Step("compile", 100, _own("compile.py")),
    Step("products", 90, _own("products.py")),
    Step("tests", 150, _tests),
    Step("bench one token", 90, _bench("kernels-one-token.json", 1)),
    Step("tune", 90, _own("tune.py")),
    Step("bench", 150, _bench("kernels.json", 1, 4, 16, 64, 2048)),
    Step("generate", 150, _generate),
    Step("blocks", 90, _own("blocks.py")),
    Step("features", 90, _own("features.py")),
)


def environment(out: Path, site: str, dry: bool) -> dict[str, str]:
    """The environment of a step: this repository's packages, and launch configs that are kept with the results."""
    paths = [ROOT, ROOT / "kernels/torch-ext", site, os.environ.get("PYTHONPATH", "")]
    made = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, filter(None, paths)))}
    made |= {"PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(out)}
    if dry:
        made |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return made


def run(step: Step, out: Path, environment: dict[str, str], dry: bool) -> Outcome:
    """Run a step, with its output on the terminal and at the end of `log.txt`."""
    started = time.perf_counter()
    print(f"== {step.name}", flush=True)
    with open(out / "log.txt", "ab", buffering=0) as log:
        log.write(f"== {step.name}\n".encode())
        process = subprocess.Popen(
            [sys.executable, *step.command(out, dry)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that the processes that it starts can be stopped with it
        )
        tee = subprocess.Popen(["tee", "-a", log.name], stdin=process.stdout)
        process.stdout.close()
        try:
            status = process.wait(None if dry else step.seconds)
            ended = "passed" if status == 0 else "failed"
        except subprocess.TimeoutExpired:
            status, ended = None, "stopped"
        finally:
            _stop(process)
        tee.wait()
    outcome = Outcome(ended, round(time.perf_counter() - started, 1), status)
    print(f"== {step.name}: {ended} after {outcome.seconds} s", flush=True)
    return outcome


def _stop(process: subprocess.Popen) -> None:
    """Kill what is left of a step's processes."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all have ended
    process.wait()


def install(wheels: Path, site: str) -> None:
    """Unpack wheels into a folder of their own."""
    options = ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", site]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", *options, *sorted(wheels.glob("*.whl"))], check=True
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in STEPS]
    parser.add_argument("--out", type=Path, required=True, help="folder for the results; created if missing")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install for the run")
    parser.add_argument("--steps", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--resume", action="store_true", help="skip steps that passed according to proof.json")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter")
    args = parser.parse_args()
    if args.wheels is not None and not args.wheels.is_dir():
        parser.error(f"--wheels {args.wheels}: there is no such folder")
    return args


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which stops the step that is running
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    record = out / "proof.json"
    done = json.loads(record.read_text()) if args.resume and record.is_file() else {}
    wanted = [step for step in STEPS if step.name in args.steps and done.get(step.name, {}).get("ended") != "passed"]
    with tempfile.TemporaryDirectory(prefix="gpu_proof-") as site:
        if args.wheels is not None:
            install(args.wheels, site)
        for step in wanted:
            done[step.name] = asdict(run(step, out, environment(out, site, args.dry_run), args.dry_run))
            partial = record.with_suffix(".partial")
            partial.write_text(json.dumps(done, indent=1) + "\n")
            partial.replace(record)
    print("\n" + "\n".join(f"{name:<16} {done[name]['ended']:<8} {done[name]['seconds']:6.1f} s" for name in done))
    sys.exit(any(outcome["ended"] != "passed" for outcome in done.values()))


if __name__ == "__main__":
    main()
