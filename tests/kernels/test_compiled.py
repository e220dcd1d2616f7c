"""The kernels compiled for GPUs that need not be here: they fit the registers, and decode in few instructions."""

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from hf_pcdvq_kernels.triton import compiled  # noqa: E402

# SASS instructions per decoded weight in the main loop, one token, sm_90.
MOST = {"pcdvq": 3.5, "ccq 2.75": 3.5, "ccq 2.5": 3.5, "ccq 2.0625": 4.5, "stream": 6.0}
# What a thread block may have on sm_80, the least of the targets.
SHARED = 163 * 1024


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("variant", compiled.products((1,)), ids=lambda variant: variant.name)
def test_products_of_one_token(variant, target):
    figures = compiled.measure(variant, compiled.TARGETS[target])
    assert figures.spills == 0 and figures.shared <= SHARED
    if target == "sm_90":
        (most,) = (limit for name, limit in MOST.items() if variant.name.startswith(name))
        assert figures.instructions <= most


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("variant", compiled.others(), ids=lambda variant: variant.name)
def test_other_kernels(variant, target):
    figures = compiled.measure(variant, compiled.TARGETS[target])
    assert figures.spills == 0 and figures.shared <= SHARED


@pytest.mark.parametrize("codec", ["pcdvq 2.0", "pcdvq 2.25", "ccq 2.75", "ccq 2.5", "ccq 2.0625", "stream 2.0"])
@pytest.mark.parametrize("tokens", [4, 16])
def test_products_of_several_tokens(codec, tokens):
    (variant,) = (variant for variant in compiled.products((tokens,)) if variant.name.startswith(codec + ","))
    figures = compiled.measure(variant, compiled.TARGETS["sm_90"])
    assert figures.spills == 0 and figures.shared <= SHARED
