"""What is kept of the results of lm-eval."""

import pytest
from conftest import byte_tokenizer, tiny_llama

from hf_pcdvq.evaluation.tasks import Score, run_tasks

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install lm-eval")


def test_scores_name_the_data_set_where_it_is_on_the_hub(monkeypatch):
    """Downloads nothing: lm-eval returns what it would for a task of its own, and for one on local lines of JSON."""
    figures = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1}
    answer = {
        "results": {"piqa": figures, "mine": figures},
        "configs": {"piqa": {"dataset_path": "baber/piqa"}, "mine": {"dataset_path": "json"}},
        "n-samples": {"piqa": {"effective": 4}, "mine": {"effective": 4}},
    }
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda *arguments, **options: answer)
    scores = run_tasks(tiny_llama(), byte_tokenizer(), ["piqa", "mine"], None)
    assert scores == {
        ("piqa", "acc"): Score(0.5, 0.1, 4, "baber/piqa"),
        ("mine", "acc"): Score(0.5, 0.1, 4, None),
    }
