"""The choice between Triton, the CPU kernels and PyTorch, on a device that Triton does not support."""

import os
import warnings

import hf_pcdvq_kernels
import pytest
import torch
from hf_pcdvq_kernels import backend
from packing import random_packed

import hf_pcdvq


@pytest.fixture(autouse=True)
def restore():
    yield
    hf_pcdvq.set_backend("auto")


def product():
    return torch.ops.hf_pcdvq_kernels.ccq_matmul(torch.ones(1, 64), *random_packed("ccq-2.5", 4, 64))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'cpu', 'triton', 'reference', got 'cuda'"):
        hf_pcdvq.set_backend("cuda")
    assert hf_pcdvq.get_backend() == "auto"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs kernels on a CPU")
def test_triton_on_a_cpu_is_refused():
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    expected = product()
    hf_pcdvq.set_backend("triton")
    with pytest.raises(RuntimeError, match="set to 'triton', but Triton has no kernels for the device 'cpu'"):
        product()
    hf_pcdvq.set_backend("reference")
    torch.testing.assert_close(product(), expected, rtol=1e-3, atol=1e-3)


def test_a_compiled_graph_takes_the_choice_as_a_constant():
    """`torch.compile` looks through caches, warns of it, and cannot trace how Triton or the library are looked for."""
    torch.compiler.reset()

    def prepared_and_next(x):
        return hf_pcdvq_kernels.prepare(x, None, "ccq-2.5"), x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, out = torch.compile(prepared_and_next, fullgraph=True, backend="eager")(torch.ones(1, 64))
    assert torch.equal(out, torch.full((1, 64), 2.0))


def test_a_compiled_graph_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(backend, "_cpu_obstacle", lambda device, dtype: "the CPU kernels are missing: not here")
    torch.compiler.reset()

    def prepared_and_next(x):
        return hf_pcdvq_kernels.prepare(x, None, "ccq-2.5"), x + 1

    with pytest.warns(UserWarning, match="slow, because the CPU kernels are missing: not here"):
        torch.compile(prepared_and_next, fullgraph=True, backend="eager")(torch.ones(1, 64))
