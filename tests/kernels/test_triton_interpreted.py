"""test_triton.py where there is no GPU; a part per process keeps failures readable. See `interpreted.py`."""

from pathlib import Path

import pytest
from interpreted import run, without_gpu


@without_gpu
@pytest.mark.parametrize("part", ["pcdvq", "ccq", "not pcdvq and not ccq and not stream"])
def test_interpreted(part):
    run(Path(__file__).with_name("test_triton.py"), part)
