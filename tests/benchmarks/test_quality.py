"""benchmarks/quality.py with user-supplied texts on a tiny model, and where texts come from."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
TEXT = "the river rises in a mountain and falls slowly down to the sea. " * 40


@pytest.fixture
def quality(tiny_model_dir, monkeypatch, caplog):
    """The script as a module, with the tiny model in place of SmolLM2 and short windows."""
    caplog.set_level(logging.ERROR, "hf_pcdvq")  # as the script does; caplog restores the level
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import quality

    monkeypatch.setattr(quality, "CONTEXT", 64)
    monkeypatch.setattr(quality, "save_smollm2", lambda out: shutil.copytree(tiny_model_dir, out))
    return quality


@pytest.fixture
def texts(quality, monkeypatch, tmp_path):
    """The texts module, as if there were no ../shared."""
    import texts

    monkeypatch.setattr(texts, "SHARED", tmp_path / "none")
    return texts


@pytest.fixture
def main(quality, monkeypatch, tmp_path):
    """Runs the script with arguments, in this process."""

    def call(*options):
        threads = ("--threads", "1")
        arguments = ["quality.py", "--out", tmp_path / "out.json", *threads, *options]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        quality.main()

    return call


@pytest.fixture
def files(tmp_path):
    text, dataset = tmp_path / "evaluate.txt", tmp_path / "calibrate.txt"
    text.write_text(TEXT)
    dataset.write_text(TEXT[::-1])
    return "--text", text, "--dataset", dataset


def test_a_row_on_texts_of_ones_own(quality, texts, main, files, tmp_path, capsys):
    only = "--only", f"{quality.PROBE}, c4, {quality.FULL} windows"
    main(*files, *only, "--windows", 2, "--length", 32)
    shown = capsys.readouterr().out
    content = json.loads((tmp_path / "out.json").read_text())
    (row,) = content["rows"]
    assert row["row"] == f"{quality.PROBE}, calibrate.txt, {quality.FULL} windows"
    assert row["calibration"]["text"] == "calibrate.txt" and row["windows"] == 2
    assert row["kl_mean"] > 0.001
    assert content["text"] == "evaluate.txt" and "evaluate.txt, windows of 64 tokens" in shown
    before = (tmp_path / "out.json").read_bytes()
    main(*files, *only, "--windows", 2)  # the row is already there
    main("--table")
    assert capsys.readouterr().out.count("evaluate.txt, windows of 64 tokens") == 2
    assert (tmp_path / "out.json").read_bytes() == before
    with pytest.raises(SystemExit, match="its text is 'evaluate.txt', not 'WikiText-2 test'"):
        main(*only)


def test_without_shared_and_hub_it_says_what_to_give(quality, texts, main, monkeypatch):
    def load(*arguments, **options):
        raise ConnectionError("no route to host")

    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(SystemExit, match="could not be .* from the Hub .*no route to host.*--text"):
        main("--only", quality.PROBE)


def test_a_text_shorter_than_a_window_is_refused(quality, main, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(SystemExit, match="5 tokens, fewer than the 64 of one window"):
        main("--text", tmp_path / "short.txt")


@pytest.mark.parametrize("option", ["--text", "--dataset"])
def test_missing_files_are_named(main, option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(option, tmp_path / "none.txt")
    assert f"{option} {tmp_path / 'none.txt'}: there is no such file" in capsys.readouterr().err


def test_texts_are_those_of_shared_or_else_of_the_hub(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "wikitext2", lambda: "from the Hub")
    found = texts.Texts()
    assert found.evaluation_text() == "from the Hub"
    assert found.calibration_data("c4") == "allenai/c4:en"
    assert found.calibration_data("wikitext2_train") == "Salesforce/wikitext:wikitext-2-raw-v1"
    for name in ("wikitext2/test.txt", "calibration/c4.txt"):
        (tmp_path / "none" / name).parent.mkdir(parents=True)
        (tmp_path / "none" / name).write_bytes(b"a\r\nb")
    assert found.evaluation_text() == "a\r\nb"
    assert found.calibration_data("c4") == tmp_path / "none" / "calibration" / "c4.txt"
    assert (found.evaluation_name, found.calibration_name("c4")) == ("WikiText-2 test", "c4")
