"""`benchmarks/objective.py`: the prompts that the model answers."""

import json
from pathlib import Path

PROMPTS = Path(__file__).resolve().parents[2] / "benchmarks/prompts.jsonl"


def test_prompts_are_conversations_of_every_kind():
    lines = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    assert {line["kind"] for line in lines} == {"chat", "document", "tool", "code", "language"}
    for line in lines:
        assert line["messages"][-1]["role"] == "user" and all(turn["content"] for turn in line["messages"])
