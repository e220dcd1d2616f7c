"""benchmarks/bench_generate.py with a tiny model on the CPU: checks the contents of its file, not the speed."""

import json
import sys
from pathlib import Path

import pytest
import torch

from hf_pcdvq.evaluation.speed import measure_speed
from hf_pcdvq.modules import QuantLinear

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench_generate(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_generate

    return bench_generate


def test_ratios_are_quotients_of_the_speeds(bench_generate, monkeypatch, tmp_path, capsys):
    options = ["--settings", "pcdvq-2.25", "stream-2.0", "--new-tokens", "4", "--runs", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench_generate.py", "--smoke", *options])
    bench_generate.main()
    shown = capsys.readouterr().out
    content = json.loads((tmp_path / "cpu-generate.json").read_text())
    rows = content["rows"]
    assert [row["setting"] for row in rows] == ["bf16", "pcdvq-2.25", "stream-2.0"]
    for row in rows:
        assert row["ratio"] == row["tokens_per_second"] / rows[0]["tokens_per_second"] > 0
        assert (row["cache_implementation"], row["new_tokens"], row["dtype"]) == ("static", 4, "bfloat16")
        assert f"{row['tokens_per_second']:.1f}" in shown and f"{row['ratio']:.2f}" in shown
    assert all(row["model_bytes"] < rows[0]["model_bytes"] / 2 for row in rows[1:])
    assert content["model"]["num_hidden_layers"] == 2 and "target: 2.5 times as fast as bf16" in shown


@pytest.mark.parametrize("setting", ["pcdvq-2.0", "ccq-2.5", "ccq-2.0625-published", "stream-2.25"])
def test_packed_models_are_packed_and_run(setting, bench_generate):
    model = bench_generate.packed_model(bench_generate.tiny(), setting, torch.device("cpu"))
    packed = [name for name, layer in model.named_modules() if isinstance(layer, QuantLinear)]
    assert len(packed) == 2 * 7 and type(model.lm_head) is torch.nn.Linear
    for name in packed:
        layer = model.get_submodule(name)
        specs = layer.codec.specs(layer.out_features, layer.in_features)
        assert {key: (tuple(part.shape), part.dtype) for key, part in layer.packed.items()} == specs
        assert layer.packed[""].unique().numel() > 64  # random, not zeros
    assert model(input_ids=torch.arange(4)[None]).logits.isfinite().all()


def test_the_cache_is_handed_to_generate_only_where_one_is_asked_for(bench_generate, monkeypatch):
    model = bench_generate.dense_model(bench_generate.tiny(), torch.device("cpu"))
    given = []
    monkeypatch.setattr(
        model, "generate", lambda ids, **options: given.append(options.get("cache_implementation", "-"))
    )
    for cache in ("static", None):
        measure_speed(model, new_tokens=2, runs=1, progress=False, cache_implementation=cache)
    assert given == ["static", "static", "-", "-"]


def test_a_config_of_ones_own(bench_generate, monkeypatch, tmp_path, capsys):
    file, out = tmp_path / "config.json", tmp_path / "out.json"
    config = bench_generate.tiny()
    config.num_hidden_layers = 1
    config.save_pretrained(tmp_path)
    options = ["--smoke", "--config", str(file), "--settings", "ccq-2.5", "--new-tokens", "2", "--runs", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_generate.py", *options, "--out", str(out)])
    bench_generate.main()
    assert json.loads(out.read_text())["model"]["num_hidden_layers"] == 1
    file.unlink()
    with pytest.raises(SystemExit):
        bench_generate.main()
    assert f"--config {file}: there is no such file" in capsys.readouterr().err


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("options, message", [([], "this measures a GPU"), (["--smoke"], "--smoke needs --out")])
def test_what_would_mean_nothing_is_refused(options, message, bench_generate, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_generate.py", *options])
    with pytest.raises(SystemExit):
        bench_generate.main()
    assert message in capsys.readouterr().err
