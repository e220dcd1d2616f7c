"""Products captured in CUDA graphs, which the interpreter does not know."""

import hf_pcdvq_kernels as ops
import pytest
import torch
from packing import SETTINGS, op_pair, random_packed

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from hf_pcdvq_kernels.triton import product  # noqa: E402


@pytest.fixture(autouse=True)
def triton():
    ops.set_backend("triton")
    yield
    ops.set_backend("auto")


@pytest.mark.parametrize("setting", SETTINGS)
def test_products_are_captured_in_a_cuda_graph(setting):
    packed, matmul = random_packed(setting, 512, 2048, device="cuda"), op_pair(setting)[1]
    x = torch.randn(1, 2048, device="cuda", dtype=torch.bfloat16)
    expected = matmul(x, *packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = matmul(x, *packed)
    x.mul_(2)
    graph.replay()
    assert torch.equal(out, expected * 2)


@pytest.mark.parametrize("setting", ["pcdvq-2.25", "ccq-2.5", "stream-2.0"])
def test_overlapping_launches_change_nothing(setting, monkeypatch):
    """Many products in one graph, with shared activations, splits, and buffers that are freed and used again."""
    signs, matmul = torch.ones(64, device="cuda"), op_pair(setting)[1]
    layers = [random_packed(setting, 2048, 2048, seed=seed, device="cuda") for seed in range(8)]

    def chain():
        x = torch.randn(1, 2048, generator=torch.Generator().manual_seed(1)).half().cuda()
        graph = torch.cuda.CUDAGraph()
        matmul(x, *layers[0], signs=signs)  # compiled before the capture
        with torch.cuda.graph(graph):
            for number in range(200):
                prepared = ops.prepare(x, signs, setting)
                first, second = (matmul(x, *layers[(number + i) % 8], signs=signs, prepared=prepared) for i in (0, 1))
                x = torch.nn.functional.rms_norm(first + second, (2048,))
        graph.replay()
        return x.clone()

    overlapped = chain()
    monkeypatch.setattr(product, "has_pdl", lambda device: False)
    assert not overlapped.isnan().any() and torch.equal(overlapped, chain())
