"""Runs a program in two processes, as users do: with torchrun, on this machine, through gloo."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

_LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess:
    """Run a program, each process on one thread of the CPU, and return its output."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.run([*_LAUNCH, *arguments], check=check, env=environment, capture_output=True, text=True)


def made_once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills, once for all tests and all processes of pytest-xdist."""
    parent = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        parent = parent.parent
    folder = parent / name
    with FileLock(parent / f"{name}.lock"):
        if not folder.exists():
            folder.mkdir()
            make(folder)
    return folder
