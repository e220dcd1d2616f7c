"""The Triton kernel for the stream layout's search: against the reference in Triton's interpreter, and compiled."""

import os
import subprocess
import sys

import pytest
import torch
from hf_pcdvq_kernels.formats.stream import stream_layout

from hf_pcdvq.codecs.stream import StreamCodec

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

# Two rings, the second one short, and a stretch around the boundary that is longer than a ring; few weights, because
# the interpreter takes milliseconds for each.
INTERPRETED = """
import torch
from hf_pcdvq.codecs.viterbi import reference
from hf_pcdvq.codecs.viterbi import triton as viterbi_triton
from hf_pcdvq_kernels.formats.stream import stream_layout
from hf_pcdvq_kernels.reference.stream import values

viterbi_triton.STREAM_RING = reference.STREAM_RING = {ring}
layout, table = stream_layout({bits}, 12), values(12, "cpu").float() / 148
generator = torch.Generator().manual_seed(0)
targets, cost = torch.randn(1, {rows}, generator=generator), torch.rand({rows}, generator=generator)
reference.OVERLAP = 20
found = viterbi_triton.search(targets, cost, table, layout, 20)
expected = reference.search(targets, cost, table, layout)
assert found.shape == expected.shape and torch.equal(found, expected), (found, expected)
"""


@pytest.mark.parametrize("bits, rows, ring", [(2.0, 80, 64), (2.25, 128, 128), (3.0, 96, 64), (4.0, 24, 64)])
def test_interpreted_kernel_finds_what_the_reference_finds(bits, rows, ring):
    code = INTERPRETED.format(bits=bits, rows=rows, ring=ring)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("bits, window", [(2.0, 12), (2.25, 12), (4.0, 12), (2.0, 14)])
@pytest.mark.parametrize(
    "target", [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)], ids=lambda t: str(t[1])
)
def test_kernel_compiles_for_gpus_without_spilling(target, bits, window):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_pcdvq.codecs.viterbi import triton as viterbi_triton

    constants = viterbi_triton.constants(stream_layout(bits, window), 96)
    pointers = {name: "*fp32" for name in ("p_targets", "p_cost", "p_values", "p_errors")}
    signature = {**pointers, "p_found": "*i32", "rows": "i32", **dict.fromkeys(constants, "constexpr")}
    compiled = triton.compile(
        ASTSource(viterbi_triton.search_kernel, signature, constexprs=constants),
        target=GPUTarget(*target),
        options={"num_warps": viterbi_triton.warps(stream_layout(bits, window), target[2])},
    )
    if target[0] == "hip":
        assert ".vgpr_spill_count: 0" in compiled.asm["amdgcn"]
    else:
        from triton.tools.disasm import get_sass

        # STL and LDL are the stores and loads of spilled registers.
        assert not {"STL", "LDL"} & {word.split(".")[0] for word in get_sass(compiled.asm["cubin"]).split()}, (
            "it spills"
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", [2.0, 2.25, 3.0, 4.0])
def test_gpu_encodes_as_well_as_the_cpu(bits):
    codec = StreamCodec(0, 0, bits, 12)
    weight = torch.randn(640, 64, generator=torch.Generator().manual_seed(0))
    packed = {suffix: tensor.cpu() for suffix, tensor in codec.encode(weight.cuda()).items()}
    assert codec.relative_error(weight, packed) == pytest.approx(
        codec.relative_error(weight, codec.encode(weight)), rel=1e-4
    )
