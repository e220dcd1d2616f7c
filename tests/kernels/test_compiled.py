"""The kernels compiled for GPUs that need not be present: no register spills, and few instructions per weight."""

import os

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from hf_pcdvq_kernels.triton import compiled  # noqa: E402

# SASS instructions per decoded weight in the main loop, one token, sm_90.
MOST = {"pcdvq": 3.5, "ccq-2.75": 3.5, "ccq-2.5": 3.5, "ccq-2.0625": 4.5, "stream": 6.5}
# The shared memory limit per thread block on sm_80, the smallest of the targets.
SHARED = 163 * 1024

EVERY_CODEC = [variant.name for variant in compiled.products((1,))]
ONE_EACH = ["pcdvq-2.25, 1 tokens", "ccq-2.5, 1 tokens", "stream-2.0, 1 tokens"]
OTHERS = [variant.name for variant in (*compiled.dequantizations(), *compiled.others())]
SEVERAL = [f"{codec}, {tokens} tokens" for codec in ("pcdvq-2.25", "ccq-2.5", "stream-2.0") for tokens in (8, 16, 64)]
# tools/kernel_report.py compiles everything for every target. These compile in two minutes: for AMD, `stream` takes
# twenty seconds per kernel.
PAIRS = [
    *((name, target) for name in EVERY_CODEC for target in ("sm_80", "sm_90")),
    *((name, "gfx942") for name in EVERY_CODEC if not name.startswith("stream") or name in ONE_EACH),
    *((name, "sm_100") for name in ONE_EACH),
    *((name, target) for name in OTHERS for target in compiled.TARGETS),
    *((name, "sm_90") for name in SEVERAL),
]


@pytest.fixture(scope="module")
def figures():
    return dict(compiled.measure_all(PAIRS, os.cpu_count()))


@pytest.mark.parametrize("pair", PAIRS, ids=", ".join)
def test_kernels_fit(figures, pair):
    assert figures[pair].spills == 0 and figures[pair].shared <= SHARED


@pytest.mark.parametrize("name", EVERY_CODEC)
def test_one_token_is_decoded_in_few_instructions(figures, name):
    (most,) = (limit for codec, limit in MOST.items() if name.startswith(codec))
    assert figures[name, "sm_90"].instructions <= most
