"""hf_pcdvq.progress: lines where there is no terminal."""

import io
import sys
import time

import pytest

from hf_pcdvq import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream, **options):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.progress_of(total=3, desc="Calibrating", unit="weight", **options) as bar:
        for number in range(3):
            time.sleep(0.01)  # longer than the interval, so that every state is shown
            bar.set_postfix_str(f"layer {number}", refresh=False)
            bar.update()
    return stream.getvalue()


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(progress, "_FIRST", 1e-9)
    monkeypatch.setattr(progress, "_INTERVAL", 1e-9)


def test_every_state_is_a_line_of_its_own(monkeypatch, at_once):
    text = shown(monkeypatch, io.StringIO())
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    lines = text.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"Calibrating: weight {done} of 3" for done in (1, 2, 3)]
    assert lines[1].endswith(" left, layer 1")


def test_a_bar_inside_another_has_lines_without_movements(monkeypatch, at_once):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress.progress_of(range(2), desc="Outer"):
        for _ in progress.progress_of(range(2), desc="Inner"):
            time.sleep(0.01)
    text = stream.getvalue()
    assert "\x1b" not in text and all(line.startswith(("Outer", "Inner")) for line in text.splitlines())
    assert "Inner: it 1 of 2" in text and "Outer: it 2 of 2" in text


def test_short_work_has_no_lines(monkeypatch):
    assert shown(monkeypatch, io.StringIO()) == ""


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch):
    text = shown(monkeypatch, Terminal())
    assert "\r" in text and "Calibrating: " in text and "it 3 of 3" not in text


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_nothing_is_shown_that_is_not_wanted(monkeypatch, at_once, stream):
    assert shown(monkeypatch, stream(), shown=False) == ""
