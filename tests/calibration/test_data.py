"""Calibration data in every form, as windows of tokens."""

import json
import re

import pytest
import torch
from conftest import byte_tokenizer
from transformers import PreTrainedTokenizerFast

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


LONG = "".join(f"line {number} of a long text\n" for number in range(200_000))  # 5.9 MB


def windows_of(data, count=4, length=64, seed=0):
    return read_windows(data, byte_tokenizer(), count, length, seed)


def numbers(windows):
    """The numbers of the lines of `LONG` that stand whole in windows."""
    text = [byte_tokenizer().decode(window) for window in windows]
    return [int(word) for part in text for word in re.findall(r"line (\d+) of", part)]


@pytest.mark.parametrize("form", ["text", "jsonl", "list", "one string"])
def test_of_a_long_dataset_only_what_is_needed_is_read_from_everywhere(tmp_path, form, monkeypatch):
    lines = [line for line in LONG.splitlines(keepends=True)]
    if form == "text":
        data = tmp_path / "long.txt"
        data.write_text(LONG)
    elif form == "jsonl":
        data = tmp_path / "long.jsonl"
        data.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    else:
        data = lines if form == "list" else [LONG]
    tokenized = []
    call = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerFast,
        "__call__",
        lambda self, text, **options: tokenized.append(len(text)) or call(self, text, **options),
    )
    windows = read_windows(data, byte_tokenizer(), 100, 64, seed=0)
    assert windows.shape == (100, 64)
    assert sum(tokenized) < len(LONG) / 20
    found = numbers(windows)
    assert len(found) > 100
    assert min(found) < 120_000 < max(found)
    again, other = (read_windows(data, byte_tokenizer(), 100, 64, seed) for seed in (0, 1))
    assert torch.equal(windows, again)
    assert not torch.equal(windows, other)


def test_pieces_of_a_long_text_are_its_own_lines_and_characters(tmp_path):
    for text in ("höhe über dem meer\n" * 230_000, "ä" * 4_500_000):
        (tmp_path / "long.txt").write_text(text, encoding="utf-8")
        for data in (tmp_path / "long.txt", [text]):
            windows = windows_of(data, count=50)
            whole = "".join(byte_tokenizer().decode(window) for window in windows).replace("</s>", "")
            # Windows may cut a character at their ends, but no piece does.
            assert set(whole) <= {*text, "\ufffd"}
            assert whole.count("\ufffd") <= 4 * 50


def test_byte_order_mark_is_no_text(tmp_path):
    for name, content in (("a.txt", TEXT), ("a.jsonl", json.dumps(TEXT)), ("a.json", json.dumps([TEXT]))):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert torch.equal(windows_of(tmp_path / name), windows_of([TEXT]))


def test_json_list_is_a_list_of_documents(tmp_path):
    documents = [{"text": TEXT}, {"messages": [{"role": "user", "content": TEXT}]}]
    (tmp_path / "data.json").write_text(json.dumps(documents))
    assert torch.equal(windows_of(tmp_path / "data.json"), windows_of(documents))


def test_tools_of_a_conversation_reach_the_chat_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for tool in tools %}<{{ tool.name }}>{% endfor %}{{ messages[0].content }}"
    talk = {"messages": [{"role": "user", "content": "weather?"}], "tools": [{"name": "look_up"}]}
    windows = read_windows([talk], tokenizer, 1, 17, seed=0)
    assert tokenizer.decode(windows[0]) == "<look_up>weather?"


LINE = json.dumps({"text": TEXT}).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINE + b"\n\n" + LINE[:50], r"a.jsonl, line 3: not JSON, or cut off"),
        ("a.jsonl", LINE + b"\n" + b'{"answer": 1}\n', r"a.jsonl, line 2: expected a field 'text'"),
        ("a.jsonl", b"", "the calibration data has 0 tokens"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', "a.json is not JSON: .* is called .jsonl"),
        ("a.json", b'{"text": "a"}', "a.json: expected a list of texts or conversations, got dict"),
        ("a.json", b'["a", 3]', "a.json, item 1: expected a text or a list of chat messages, got int"),
        ("a.txt", "größe".encode("utf-16"), "a.txt is not UTF-8: byte 0xff at position 0"),
        ("a.txt", b"x" * 10 + b"\xe4", "a.txt is not UTF-8: byte 0xe4 at position 10"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        windows_of(tmp_path / name)


def test_cut_line_of_a_long_file_is_named_by_its_number(tmp_path):
    lines = [json.dumps({"text": f"line {number}"}) for number in range(220_000)]
    lines[40_000:] = ['{"text": "cut'] * 180_000
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"a.jsonl, line ([4-9]\d{4}|\d{6}): not JSON, or cut off"):
        windows_of(tmp_path / "a.jsonl", count=100)


def test_conversation_that_the_template_does_not_accept_is_named():
    tokenizer = byte_tokenizer()
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    with pytest.raises(
        ValueError, match=r"item 1: the tokenizer's chat template .* which calls tools \(UndefinedError: "
    ):
        read_windows(["text", [{"role": "user", "content": "hi"}, call]], tokenizer, 1, 4, seed=0)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="item 0: .* does not accept the conversation .*roles must alternate"):
        read_windows([[{"role": "user", "content": "hi"}]], tokenizer, 1, 4, seed=0)


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
