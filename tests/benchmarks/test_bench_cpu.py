"""benchmarks/bench_cpu.py on tiny layers and models: checks the contents of its file, not the speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_pcdvq_kernels.cpu.library import Library, load
from hf_pcdvq_kernels.random_weights import random_weight

pytest.importorskip("numba", reason="Numba is optional")
pytestmark = pytest.mark.skipif(not isinstance(load(), Library), reason="the CPU kernels were not built")

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the script as a user does; returns its file and output."""
    folder = tmp_path_factory.mktemp("bench")

    def call(*options):
        file = folder / "cpu.json"
        command = [sys.executable, SCRIPTS / "bench_cpu.py", "--smoke", "--threads", "1", "--out", file, *options]
        done = subprocess.run([*command, "--work", folder / "work"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return file, done.stdout

    return call


@pytest.fixture(scope="module")
def smoke(run):
    return run("--parts", "layer", "generate", "memory")


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import cpu_llama
    import cpu_numba
    import cpu_results
    import cpu_timing

    return {"llama": cpu_llama, "numba": cpu_numba, "results": cpu_results, "timing": cpu_timing}


def test_every_row_says_what_it_is_about_and_where_it_was_measured(smoke):
    content = json.loads(smoke[0].read_text())
    assert content["setup"]["torch"] == torch.__version__ and content["setup"]["machine"]
    rows = content["rows"]
    assert all(row["threads"] == 1 and row["instructions"] == load().instructions[0] for row in rows)
    layers = {(row["tokens"], row["weight"]): row for row in rows if row["part"] == "layer"}
    formats = {"pcdvq-2.25", "pcdvq-2.0", "stream-2.0", "ccq-2.75", "ccq-2.5", "ccq-2.0625", "int8"}
    assert {weight for _, weight in layers} >= formats and {tokens for tokens, _ in layers} == {1, 32}
    assert all(row["ratio_of_best"] == row["against_best_seconds"] / row["best_seconds"] for row in layers.values())
    (model,) = [row for row in rows if row["part"] == "generate"]
    assert model["packed_bytes"] < model["dense_bytes"] / 2 and model["new_tokens"] == 32
    (memory,) = [row for row in rows if row["part"] == "memory"]
    assert memory["resident_bytes"] > memory["imported_bytes"] > memory["file_bytes"] > 100_000
    assert "times bf16" in smoke[1] and "files + 150 MB" in smoke[1]


def test_tables_for_documents_show_the_ratios(smoke, modules, monkeypatch, capsys):
    import bench_cpu

    rows = json.loads(smoke[0].read_text())["rows"]
    monkeypatch.setattr(sys, "argv", ["bench_cpu.py", "--table", "--markdown", "--out", str(smoke[0])])
    bench_cpu.main()
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("| 256 x 128, 32 tokens |")]
    ratios = [f"{row['ratio']:.2f}" for row in rows if row["part"] == "layer" and row["tokens"] == 32]
    assert [cell.strip() for cell in line.split("|")[2 : 2 + len(ratios)]] == ratios


def test_what_is_in_the_file_is_not_measured_again(smoke, run):
    before = smoke[0].read_text()
    run("--parts", "layer", "generate", "memory")
    assert smoke[0].read_text() == before


def test_pytorch_is_masked_with_the_library(smoke, run, monkeypatch):
    if "avx2" not in load().instructions:
        pytest.skip("this CPU lacks AVX2")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    rows = json.loads(run("--parts", "overhead", "--instructions", "avx2")[0].read_text())["rows"]
    assert [row["instructions"] for row in rows if row["part"] == "overhead"] == ["avx2"]
    assert "ATEN_CPU_CAPABILITY" not in os.environ


def test_rows_of_another_machine_are_not_mixed(smoke, modules, tmp_path):
    file = tmp_path / "cpu.json"
    content = json.loads(smoke[0].read_text())
    content["setup"]["machine"] = "another"
    file.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match="was measured with machine another, here one; .*Give another --out to start a new file"
    ):
        modules["results"].Results.opened(file, {"machine": "one", "run": "full"})
    file.write_text("{}")
    with pytest.raises(ValueError, match="does not hold results of bench_cpu.py"):
        modules["results"].Results.read(file)


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"part": "layer", "tokens": 1, "weight": "stream-2.0", "ratio": 2.9}, "MISSED, >= 3.0"),
        ({"part": "layer", "tokens": 1, "weight": "int8", "ratio": 0.1}, ""),
        ({"part": "layer", "tokens": 8, "weight": "int8", "ratio": 1.0}, "met, >= 1.0"),
        ({"part": "layer", "tokens": 512, "weight": "ccq-2.5", "ratio": 0.7}, "met, >= 0.7"),
        ({"part": "generate", "model": "SmolLM2-135M", "weight": "pcdvq-2.25", "ratio": 1.2}, "met, >= 1.2"),
        ({"part": "generate", "model": "1.1B", "weight": "pcdvq-2.25", "ratio": 1.9}, "MISSED, >= 2.0"),
        ({"part": "generate", "model": "3B", "weight": "x", "ratio": 1.3, "instructions": "avx2"}, "met, >= 1.2"),
        ({"part": "quality", "kl_mean": 0.002}, "MISSED, < 0.002"),
        ({"part": "memory", "resident_bytes": 300 << 20, "imported_bytes": 0, "file_bytes": 149 << 20}, "MISSED"),
        ({"part": "memory", "resident_bytes": 300 << 20, "imported_bytes": 1 << 20, "file_bytes": 149 << 20}, "met"),
    ],
)
def test_targets(row, expected, modules):
    row = {"tokens": None, "weight": None, "instructions": "avx512", **row}
    assert modules["results"].verdict(row).startswith(expected) and bool(modules["results"].verdict(row)) == bool(
        expected
    )


def test_ratios_are_medians_over_rounds_not_quotients_of_medians(modules):
    times = {"ours": [1.0, 2.0, 4.0], "bf16": [3.0, 2.0, 4.0]}
    compared = modules["timing"].compared(times, "ours", "bf16")
    assert (compared["ratio"], compared["ratio_of_best"]) == (1.0, 2.0)
    assert (compared["seconds"], compared["against_seconds"], compared["rounds"]) == (2.0, 3.0, 3)


def test_runs_alternate_and_the_first_round_does_not_count(modules):
    order, clock = [], iter(range(100))

    def run(name):
        order.append(name)
        return float(next(clock))

    times = modules["timing"].alternated({name: lambda name=name: run(name) for name in ("a", "b")}, 2)
    assert order == ["a", "b"] * 3 and times == {"a": [2.0, 4.0], "b": [3.0, 5.0]}


@pytest.mark.parametrize("format", ["pcdvq-2.25", "stream-2.0"])
def test_numba_computes_the_same_products(format, modules):
    weight = random_weight(format, 512, 256)
    x = torch.randn(256, generator=torch.Generator().manual_seed(0))
    expected = weight.reference_rows(torch.float32)(0, 512) @ x
    for name, product in modules["numba"].PRODUCTS[format](weight).items():
        assert (torch.from_numpy(product(x.numpy())) - expected).norm() < 1e-3 * expected.norm(), name


@pytest.mark.parametrize("type", ["Q2_K", "IQ2_XXS"])
def test_files_for_llamacpp_are_read_as_models_of_that_shape(type, modules, tmp_path):
    from gguf import GGUFReader
    from transformers import LlamaConfig

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=64)
    modules["llama"].write_gguf(tmp_path / "model.gguf", config, type)
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(tensors) == 3 + 7 + 2
    key = tensors["blk.0.attn_k.weight"]
    assert key.tensor_type.name == type and list(key.shape) == [256, 128]
    assert np.isfinite(tensors["output.weight"].data.view(np.float16)[:, 104]).all()  # the scale of the first block


def test_rows_that_are_not_whole_blocks_are_refused(modules):
    with pytest.raises(ValueError, match="rows of 128 weights are not whole blocks of 256"):
        modules["llama"].random_rows(modules["llama"].HEAD, 4, 128, np.random.default_rng(0))
