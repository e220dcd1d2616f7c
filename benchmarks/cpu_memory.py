"""Memory that a packed model takes, for benchmarks/bench_cpu.py; runs as a process of its own, which imports nothing else.

python benchmarks/cpu_memory.py FOLDER THREADS
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def in_new_process(folder: Path, threads: int) -> dict[str, int]:
    """What `report` measures in a process of its own."""
    command = [sys.executable, __file__, str(folder), str(threads)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def report(folder: Path, threads: int) -> dict[str, int]:
    """Bytes resident before and after loading a packed model, and after it has generated, and those of its files."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  (the class, which is imported late)
    from transformers.utils.logging import disable_progress_bar

    import hf_pcdvq  # noqa: F401  (registers the methods)

    disable_progress_bar()
    torch.set_num_threads(threads)
    before = _resident()
    model = AutoModelForCausalLM.from_pretrained(folder)
    loaded = _resident()
    model.generate(torch.arange(16)[None], max_new_tokens=8, do_sample=False)
    after = _resident()
    return {
        "imported_bytes": before["VmRSS"],
        "loaded_bytes": loaded["VmRSS"],  # the weights are mapped, and read when they are first used
        "resident_bytes": after["VmRSS"],
        "resident_anonymous_bytes": after["RssAnon"],
        "peak_bytes": after["VmHWM"],
        "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }


def _resident() -> dict[str, int]:
    """Sizes in bytes from Linux's record of this process."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {name.rstrip(":"): int(rest[0]) * 1024 for name, *rest in lines if rest[1:] == ["kB"]}


if __name__ == "__main__":
    print(json.dumps(report(Path(sys.argv[1]), int(sys.argv[2]))))
