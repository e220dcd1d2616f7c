"""One product of every format and dtype, and its decoded weight, against the PyTorch reference in float64.

Every format runs in a process of its own, since an illegal access ends all work of the process that made it. For what
fails, the traceback and the PTX of the kernels go to `failures.txt`.
"""

from __future__ import annotations

import argparse
import json
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import hf_pcdvq_kernels as ops
import torch
from compile import PROVED
from hf_pcdvq_kernels.formats import FORMATS
from hf_pcdvq_kernels.random_weights import random_packed
from hf_pcdvq_kernels.triton.launch_config import kernels_of

NAMES = [name for name, family in FORMATS.items() if family.has_kernels]
TOKENS = (1, 16)  # float16 pairs, and matrix units
DRY_NAMES, DRY_TOKENS = ("pcdvq-2.25",), (1,)
# As in tests/kernels/test_triton.py, rounding to the dtype; for float32 that of sums over thousands of inputs.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 2e-3, torch.float32: 1e-5}
BLOCK = 64  # of the rotation


def check(name: str, shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: str) -> float:
    """The relative error of a product; raises ValueError if a decoded weight differs from the reference by one bit."""
    family = ops.family_of(name).family
    packed = random_packed(name, *shape, device=device)
    signs = torch.randint(0, 2, (BLOCK,), device=device).float() * 2 - 1
    x = torch.randn(tokens, shape[1], device=device).to(dtype)
    ops.set_backend("triton")
    out = ops.matmul(family, x, packed, signs=signs)
    decoded = ops.dequantize(family, packed, torch.float32)
    ops.set_backend("reference")
    weight = ops.dequantize(family, packed, torch.float64)
    if not torch.equal(decoded, ops.dequantize(family, packed, torch.float32)):
        raise ValueError(f"decoded weights differ from the reference: {name}, {shape}")
    expected = ops.hadamard(x.double(), signs) @ weight.T
    return ((out.double() - expected).norm() / expected.norm()).item()


def check_format(name: str, device: str) -> tuple[list[dict[str, Any]], str]:
    """Rows for all shapes of a format, and what is to be known of the failures."""
    rows, failures = [], ""
    dry = device == "cpu"
    for shape in PROVED[1:] if dry else PROVED:
        for tokens in DRY_TOKENS if dry else TOKENS:
            for dtype in TOLERANCE:
                row = {"format": name, "shape": shape, "tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}
                try:
                    row["error"] = check(name, shape, tokens, dtype, device)
                    row["passed"] = row["error"] < TOLERANCE[dtype]  # False for NaN
                except Exception:  # whatever it is, the others are still tried
                    row["passed"] = False
                    failures += f"== {row}\n{traceback.format_exc()}\n"
                rows.append(row)
    if not all(row["passed"] for row in rows):
        failures += _ptx(name)
    return rows, failures


def _ptx(name: str) -> str:
    """The PTX of a format's product kernels, as far as they were compiled."""
    texts = []
    for cache, *_ in kernels_of(name).matmul_kernel.device_caches.values():
        texts += [f"== {name}: {compiled.metadata}\n{compiled.asm.get('ptx')}" for compiled in cache.values()]
    return "\n".join(texts[:1])


def summary(name: str, rows: list[dict[str, Any]]) -> str:
    """What was found for a format, with the first failures."""
    bad = [row for row in rows if not row["passed"]]
    errors = [
        f"{dtype} {max((row['error'] for row in rows if row.get('dtype') == dtype and 'error' in row), default=0):.1e}"
        for dtype in ("bfloat16", "float16", "float32")
    ]
    lines = [f"{name}: {len(rows) - len(bad)} of {len(rows)} products agree; largest errors {', '.join(errors)}"]
    return "\n".join(lines + [f"  failed: {row}" for row in bad[:4]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    device, names = ("cpu", DRY_NAMES) if args.dry_run else ("cuda", args.formats)
    rows: list[dict[str, Any]] = []
    workers = 1 if args.dry_run else len(names)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        tasks = {pool.submit(check_format, name, device): name for name in names}
        for task in as_completed(tasks):
            try:
                found, failures = task.result()
            except Exception as error:  # its process died
                found, failures = [{"format": tasks[task], "passed": False}], f"{tasks[task]}: {error!r}\n"
            rows += found
            (args.out / "products.json").write_text(json.dumps(rows, indent=1) + "\n")
            with open(args.out / "failures.txt", "a", encoding="utf-8") as file:
                file.write(failures)
            print(summary(tasks[task], found), *failures.splitlines()[:30], sep="\n", flush=True)
    raise SystemExit(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    main()
