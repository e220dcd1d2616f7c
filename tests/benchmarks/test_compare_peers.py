"""benchmarks/compare_peers.py with test adapters that run in this environment."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def peers(monkeypatch, tmp_path):
    """The script as a module, with test adapters that run in this environment."""
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
        upcast=lambda model: model,
    )


@pytest.fixture
def source(peers, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "read_windows", lambda *_, **__: reference.windows)
    return peers.prepare(tmp_path, reference, peers.Texts())


def row(peers, reference, source, adapter, **options):
    peer = peers.Peer(f"with {adapter}", adapter, (), options)
    args = SimpleNamespace(work=source.parent, timeout=20 if adapter == "scaling" else 2, timed=False)
    return peers.measure(peer, source, reference, args)


def test_peer_that_changes_nothing_has_no_divergence_and_its_bits_are_counted(peers, reference, source):
    same = row(peers, reference, source, "scaling", factor=1.0)
    assert same["kl_mean"] == 0
    assert same["bits_counted"] == 4  # half a byte per weight, according to the adapter
    assert same["versions"]["torch"] == torch.__version__
    assert row(peers, reference, source, "scaling", factor=0.5)["kl_mean"] > 0.01


def test_peer_that_cannot_run_is_listed_with_what_it_said(peers, reference, source):
    assert row(peers, reference, source, "failure")["error"] == "quantization: exit code 1: no kernel for this CPU"
    assert row(peers, reference, source, "sleep")["error"] == "quantization: stopped after 2 seconds"


def test_weights_that_were_not_decoded_are_an_error_of_the_peer(peers, reference, source):
    error = row(peers, reference, source, "scaling", factor=-1.0)["error"]
    assert "q_proj.weight was not decoded: its cosine to the original is -1" in error
    # Further from the original than zeros would be, but still the peer's result.
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


def test_another_calibration_text_is_another_source(peers, reference, source, tmp_path):
    assert peers.prepare(tmp_path, reference, peers.Texts()) == source
    other = peers.prepare(tmp_path, reference, peers.Texts(dataset="my/data"))
    assert other.parent == source.parent and other != source


@pytest.mark.parametrize(
    "options, message",
    [
        (["--text", "none.txt"], "--text none.txt: there is no such file"),
        (["--dataset", "none.jsonl"], "--dataset none.jsonl: there is no such file"),
    ],
)
def test_missing_files_are_named(peers, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_peers.py", "--out", str(tmp_path / "out.json"), *options])
    with pytest.raises(SystemExit):
        peers.main()
    assert message in capsys.readouterr().err


def test_rows_on_other_texts_do_not_mix(peers, tmp_path, monkeypatch):
    file, out = tmp_path / "mine.txt", tmp_path / "out.json"
    file.write_text("a text")
    peers.write(out, [{"peer": "HQQ", "options": {}, "error": "no"}], peers.Texts(text=file))
    before = json.loads(out.read_text())
    assert (before["text"], before["calibration_text"]) == ("mine.txt", "wikitext2_train")
    for options in ([], ["--text", str(file), "--dataset", "my/data"]):
        monkeypatch.setattr(sys, "argv", ["compare_peers.py", "--out", str(out), *options])
        with pytest.raises(SystemExit, match="rows of both do not mix. Give another --out"):
            peers.main()
    assert json.loads(out.read_text()) == before
