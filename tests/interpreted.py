"""Runs a test file of the kernels in Triton's interpreter, which is chosen when Triton is imported: in a new process."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the files run on the GPU themselves")


def run(file, part=""):
    """The tests of a file, or those whose names match `part`."""
    command = [sys.executable, "-m", "pytest", "-k", part, file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
