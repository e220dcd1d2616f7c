"""Calibration data in every form, as windows of tokens."""

import json

import pytest
import torch
from conftest import byte_tokenizer

from hf_pcdvq import Calibration
from hf_pcdvq.calibration.data import read_windows, split_windows

TEXT = "".join(f"{number} little words, " for number in range(60))


def bytes_of(text):
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_text_file_is_tokenized_whole_with_its_line_ends(tmp_path):
    file = tmp_path / "text.txt"
    text = TEXT.replace(",", "\r\n")
    file.write_bytes(text.encode())
    windows = read_windows(str(file), byte_tokenizer(), 1000, 16, seed=0)
    ids = bytes_of(text)
    expected = {tuple(ids[start : start + 16]) for start in range(0, len(ids) - 15, 16)}
    assert {tuple(window) for window in windows.tolist()} == expected


def test_seed_chooses_and_the_choice_repeats(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    first, again, other = (read_windows(tmp_path / "text.txt", byte_tokenizer(), 4, 16, seed) for seed in (0, 0, 1))
    assert first.shape == (4, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_documents_are_separated_by_the_end_of_text_token():
    windows = read_windows(["ab", "cd", "ef"], byte_tokenizer(), 1, 8, seed=0)
    end = byte_tokenizer().eos_token_id
    assert windows[0].tolist() == [*bytes_of("ab"), end, *bytes_of("cd"), end, *bytes_of("ef")]


def test_jsonl_holds_texts_and_conversations_which_go_through_the_chat_template(tmp_path):
    file = tmp_path / "data.jsonl"
    talk = [{"role": "user", "content": "hi"}]
    file.write_text(f"{json.dumps({'text': 'ab'})}\n\n{json.dumps({'messages': talk})}\n")
    windows = read_windows(file, byte_tokenizer(), 1, 12, seed=0)
    end = byte_tokenizer().eos_token_id
    assert windows[0].tolist() == [*bytes_of("ab"), end, *bytes_of("user: hi\n")]
    assert torch.equal(read_windows(["ab", talk], byte_tokenizer(), 1, 12, seed=0), windows)


def test_tensors_are_taken_as_they_are():
    tokens = torch.arange(2, 34).view(4, 8)
    assert torch.equal(read_windows(tokens, None, 3, 99, seed=5), tokens[:3])
    assert torch.equal(read_windows([row[None] for row in tokens], None, 4, 99, seed=5), tokens)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("missing.txt", FileNotFoundError, "there is no calibration file missing.txt"),
        ("./missing", FileNotFoundError, "there is no calibration file ./missing"),
        (["short"], ValueError, "has 5 tokens, fewer than the 64 of one window"),
        ([{"question": "?"}], ValueError, "item 0: expected a field 'text' or 'messages', found 'question'"),
        ([3], ValueError, "item 0: expected a text or a list of chat messages, got int"),
        (7, ValueError, "must be a path, a name or a list, got int"),
        (torch.zeros(3, 8), ValueError, "must be int64"),
        ([torch.zeros(3).long(), torch.zeros(4).long()], ValueError, "must have one length, got 3 to 4 tokens"),
    ],
)
def test_what_cannot_be_used_is_named(data, error, message):
    with pytest.raises(error, match=message):
        read_windows(data, byte_tokenizer(), 4, 64, seed=0)


def test_conversation_needs_a_chat_template_and_text_a_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        read_windows([[{"role": "user", "content": "hi"}]], tokenizer, 1, 4, seed=0)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        read_windows(["text"], None, 1, 4, seed=0)


def test_data_set_on_the_hub_is_streamed_until_there_is_enough(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    rows = datasets.Dataset.from_dict({"text": [TEXT] * 50}).to_iterable_dataset()
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or rows)
    windows = read_windows("allenai/c4:en", byte_tokenizer(), 3, 32, seed=0)
    assert windows.shape == (3, 32)
    assert asked == [(("allenai/c4", "en"), {"split": "train", "streaming": True})]


def test_windows_to_measure_on_are_none_of_those_to_calibrate_on(caplog):
    tokens = torch.arange(14 * 16).view(14, 16)
    windows, holdout = split_windows(tokens, Calibration(samples=10, holdout=4))
    assert torch.equal(windows, tokens[:10]) and torch.equal(holdout, tokens[10:])
    assert not caplog.records


def test_too_little_data_is_used_whole_with_a_warning(caplog):
    tokens = torch.arange(50 * 16).view(50, 16)
    windows, holdout = split_windows(tokens, Calibration(samples=128, holdout=8))
    assert torch.equal(windows, tokens[:45]) and torch.equal(holdout, tokens[45:])
    assert "holds 50 windows of 16 tokens, not 136: 45 are calibrated on, 5 measured on" in caplog.text
