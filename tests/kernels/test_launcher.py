"""What a layer launches without Triton's call is what Triton's call launches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")


def test_a_layer_launches_what_triton_would(tmp_path):
    """The same compiled kernel, grid and arguments, also for an input that is not aligned and for one that is prepared."""
    script = Path(__file__).with_name("recorded_launches.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, script, "pcdvq-2.25"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    alone = ["prepare_kernel", "matmul_kernel", "sum_kernel"]
    assert found["launches"] == [alone, alone, alone[1:]]
    assert found["the same"] == [True, True]  # at the first call and afterwards
