"""Runs the kernel tests in Triton's interpreter if there is no GPU; one part per process keeps failures readable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")


KERNELS = Path(__file__).with_name("test_triton.py")
LAYERS = Path(__file__).parents[1] / "modules" / "test_shared_input.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the files run on the GPU themselves")
@pytest.mark.parametrize(
    "file, part",
    [
        (KERNELS, "pcdvq"),
        (KERNELS, "ccq"),
        (KERNELS, "stream"),
        (KERNELS, "not pcdvq and not ccq and not stream"),
        (LAYERS, ""),
    ],
)
def test_interpreted(file, part):
    command = [sys.executable, "-m", "pytest", "-k", part, file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
