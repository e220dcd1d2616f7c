"""Runs `test_triton.py` in Triton's interpreter, where there is no GPU; a part per process keeps failures readable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_triton.py runs on the GPU")
@pytest.mark.parametrize("part", ["pcdvq", "ccq", "stream", "not pcdvq and not ccq and not stream"])
def test_interpreted(part):
    command = [sys.executable, "-m", "pytest", "-k", part, Path(__file__).with_name("test_triton.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
