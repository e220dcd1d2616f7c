#!/usr/bin/env python3
"""The main use case on SmolLM2-135M-Instruct, for several settings: quantize on load, save, reload, compare.

For each setting: seconds to load and quantize, peak memory of the process that quantized, bits per weight of the packed
layers counted on the saved file, and whether the logits after reloading in a new process are bit-identical.

    python benchmarks/roundtrip.py --out benchmarks/results/roundtrip_smollm2.json     # about 12 minutes on 2 cores
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = (
    *("pcdvq-2.0", "pcdvq-2.25", "ccq-2.75", "ccq-2.5", "ccq-2.0625"),
    *("stream-2.0", "ccq-2.5-published"),
)
PROMPT = "The river rises in the mountains and"


def logits(model, folder):
    import torch
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        return model(ids).logits


def quantize(dense: Path, packed: Path, setting: str) -> dict:
    """Runs in a process of its own, so that its peak memory is that of one setting."""
    import torch
    from transformers import AutoModelForCausalLM

    from hf_pcdvq.config import config_of_setting
    from hf_pcdvq.files.size import count_folder

    torch.set_num_threads(2)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config_of_setting(setting))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model.save_pretrained(packed)
    torch.save(logits(model, dense), packed / "logits.pt")
    count = count_folder(packed)
    return {
        "setting": setting,
        "nominal_bits": model.config.quantization_config.codec.bits,
        "counted_bits": count.bits_per_packed_weight,
        "file_bytes": count.file_bytes,
        "seconds_to_load_and_quantize": round(seconds, 1),
        "weights_per_second": round(count.packed_weights / seconds),
        "peak_bytes": peak,
        "footprint_bytes": model.get_memory_footprint(),
    }


def compare(dense: Path, packed: Path) -> dict:
    """Runs in a new process."""
    import torch
    from transformers import AutoModelForCausalLM

    import hf_pcdvq  # noqa: F401  (registers the methods)

    torch.set_num_threads(2)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(packed)
    seconds = time.perf_counter() - start
    same = torch.equal(logits(model, dense), torch.load(packed / "logits.pt"))
    return {"seconds_to_reload": round(seconds, 1), "bit_identical_logits": same}


def convert(dense: Path) -> dict:
    from smollm2 import save_smollm2

    save_smollm2(dense)
    return {}


def run(step: str, *arguments: object) -> dict:
    """Run a step in a new process, which prints its result as its last line."""
    command = [sys.executable, __file__, "--step", step, *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step, dense, *rest = arguments.step
        steps = {"convert": convert, "quantize": quantize, "compare": compare}
        print(json.dumps(steps[step](Path(dense), *(Path(rest[0]), *rest[1:]) if rest else ())))
        return

    import torch
    import transformers

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        run("convert", dense)
        for number, setting in enumerate(SETTINGS):
            packed = Path(folder) / str(number)
            rows.append({**run("quantize", dense, packed, setting), **run("compare", dense, packed)})
            print(json.dumps(rows[-1]))
    result = {
        "model": "SmolLM2-135M-Instruct (Q4_1 decoded to bf16)",
        "machine": f"{platform.machine()}, 2 threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": "python benchmarks/roundtrip.py",
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    if not all(row["bit_identical_logits"] for row in rows):
        sys.exit("the reloaded model differs from the one in memory")


if __name__ == "__main__":
    main()
