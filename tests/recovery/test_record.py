"""What is recorded of a recovery, and what a card says of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from packed_pairs import pair, windows
from transformers import AutoModelForCausalLM

from hf_pcdvq import Recovery, recover
from hf_pcdvq.files.provenance import NAME, Provenance, Recovered
from hf_pcdvq.files.size import count_folder
from hf_pcdvq.publish.card import model_card

RECOVERED = Recovered(
    teacher="org/tiny",
    text="wiki.txt",
    held_out="other.txt",
    windows=30,
    length=64,
    held_out_windows=5,
    held_out_length=32,
    steps=20,
    best_step=16,
    batch=3,
    learning_rate=0.001,
    seconds=12.5,
    device="a CPU",
    perplexity_original=20.125,
    perplexity_before=40.25,
    perplexity_after=30.5,
    kl_before=0.75,
    kl_after=0.5,
)


def _card(folder: Path) -> str:
    return model_card(count_folder(folder), "me/tiny").text


def test_the_card_says_how_the_model_was_recovered(tiny_model_dir, tmp_path):
    packed, teacher = pair(tiny_model_dir)
    report = recover(
        packed,
        teacher,
        None,
        windows(6),
        held_out=windows(2, 16, seed=1),
        settings=Recovery(steps=3, batch=2, learning_rate=0.004),
        progress=False,
    )
    packed.save_pretrained(tmp_path)
    assert "recovery" not in _card(tmp_path)
    base = tmp_path / "base"
    base.mkdir()
    Provenance("org/tiny", "abc", "hf-pcdvq quantize org/tiny").write(base)
    report.write(tmp_path, base=base)
    kept = Provenance.read(tmp_path)
    assert kept == replace(Provenance.read(base), recovery=report.record())
    text = _card(tmp_path)
    assert "(recovery): 3 steps of 2 windows of 24 tokens of data given in Python, learning rate 0.004" in text
    figures = report.before.perplexity_original, report.before.perplexity_packed, report.after.perplexity_packed
    assert "| perplexity at context 16, 2 windows | {:.3f} | {:.3f} | {:.3f} |".format(*figures) in text
    assert f"| | {report.before.kl_mean:.4f} | {report.after.kl_mean:.4f} |" in text


def test_a_perplexity_below_the_originals_is_reported_as_over_adaptation(tiny_model_dir, tmp_path):
    pair(tiny_model_dir)[0].save_pretrained(tmp_path)
    Provenance(recovery=RECOVERED).write(tmp_path)
    assert not RECOVERED.over_adapted and "Over-adapted" not in _card(tmp_path)
    too_good = replace(RECOVERED, perplexity_after=20.0)
    Provenance(recovery=too_good).write(tmp_path)
    assert too_good.over_adapted and "**Over-adapted**" in _card(tmp_path)
    assert not replace(too_good, best_step=0).over_adapted  # such a model was that good before


def test_a_model_that_was_recovered_is_not_recovered_again(tiny_model_dir, tmp_path):
    packed, teacher = pair(tiny_model_dir)
    packed.save_pretrained(tmp_path)
    Provenance(recovery=RECOVERED).write(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was recovered already"):
        recover(again, teacher, None, windows(2), held_out=windows(2, seed=1), progress=False)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("text", 5, "recovery.text must be a text"),
        ("steps", "many", "recovery.steps must be a positive integer"),
        ("kl_after", float("nan"), "recovery.kl_after must be finite"),
        ("perplexity_after", -1.0, "recovery.perplexity_after must be finite and not negative"),
        ("command", ["rm"], "recovery.command must be a text"),
    ],
)
def test_what_no_recovery_writes_is_refused(tmp_path, field, value, message):
    Provenance(recovery=RECOVERED).write(tmp_path)
    content = json.loads((tmp_path / NAME).read_text())
    content["recovery"][field] = value
    (tmp_path / NAME).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Provenance.read(tmp_path)


def test_an_incomplete_record_is_refused(tmp_path):
    Provenance(recovery=RECOVERED).write(tmp_path)
    content = json.loads((tmp_path / NAME).read_text())
    del content["recovery"]["steps"]
    (tmp_path / NAME).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="recovery must be an object with teacher, text, held_out"):
        Provenance.read(tmp_path)


def test_a_text_is_named_by_the_caller_and_too_few_windows_are_said(tiny_model_dir, caplog):
    packed, teacher = pair(tiny_model_dir)
    options = {"held_out": windows(2, seed=1), "settings": Recovery(steps=1, batch=1), "progress": False}
    report = recover(packed, teacher, None, windows(1), dataset_name="text that the original wrote", **options)
    assert report.record().text == "text that the original wrote"
    assert "the held-out text has 2 windows of 24 tokens, not 8" in caplog.text
