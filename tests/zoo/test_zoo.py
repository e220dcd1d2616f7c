"""A small part of the sweep in `sweep.py`: an architecture of each kind, and the recorded table of the whole."""

import json
from pathlib import Path

import pytest
import sweep

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "zoo.json"
# Dense, tied and biased, fused projections, a mixture, a state space, one whose layers another module reads, an encoder.
SAMPLE = ("llama", "opt", "phi3", "qwen3_moe", "mamba", "rwkv", "bert")


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_tiny_model_computes_what_its_dequantized_twin_does(model_type):
    found = sweep.outcome("causal", model_type)
    assert found["outcome"] == "works" and found["packed"] > 0, found


def test_an_architecture_without_linear_layers_is_refused_by_name():
    found = sweep.outcome("causal", "gpt2")
    assert found["outcome"] == "refused" and "GPT2LMHeadModel has no layer that" in found["reason"]


def test_every_architecture_in_the_table_works_or_is_refused():
    table = json.loads(RECORD.read_text())
    outcomes = {
        f"{head}, {name}": entry["outcome"]
        for head, entries in table.items()
        if isinstance(entries, dict)
        for name, entry in entries.items()
    }
    assert len(outcomes) > 400
    assert not {name: found for name, found in outcomes.items() if found in {"differs", "fails"}}
