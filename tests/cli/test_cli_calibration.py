"""`hf-pcdvq quantize` with calibration: what it writes, what it keeps for a retry, and incorrect usage."""

import json
import resource

import pytest
import torch
from command_line import fail, run, succeed
from transformers import AutoModelForCausalLM

import hf_pcdvq.calibration.held_out
import hf_pcdvq.calibration.model
import hf_pcdvq.calibration.run
from hf_pcdvq import Calibration, PcdvqConfig, quantize_model

OPTIONS = ("--samples", "8", "--length", "32")


def test_folder_holds_the_model_and_the_report(tiny_model_dir, text, tmp_path):
    out = tmp_path / "packed"
    result = succeed("quantize", tiny_model_dir, "--out", out, "--dataset", text, *OPTIONS, "--setting", "pcdvq-2.0")
    assert {file.name for file in out.glob("quantization_report.*")} >= {
        "quantization_report.json",
        "quantization_report.md",
    }
    report = json.loads((out / "quantization_report.json").read_text())
    assert (report["windows"], report["length"]) == (8, 32)
    kl = report["comparison"]["kl_mean"]
    assert f"{kl:.5f} nats" in result.output
    # The run leaves nothing next to the result.
    assert {path.name for path in tmp_path.iterdir()} == {"packed", "text.txt"}

    settings = Calibration(dataset=str(text), samples=8, length=32)
    expected = quantize_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        _tokenizer(tiny_model_dir),
        PcdvqConfig(bits=2.0, calibration=settings),
        progress=False,
    )
    packed = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(2, 40)[None]
    with torch.inference_mode():
        assert torch.equal(packed(ids).logits, expected(ids).logits)


def test_tuning_loads_the_model_whole_and_is_reported(tiny_model_dir, text, tmp_path):
    out = tmp_path / "packed"
    result = succeed("quantize", tiny_model_dir, "--out", out, "--dataset", text, *OPTIONS, "--tune-steps", "2")
    assert "tune_steps=2 takes a backward pass through all of it" in result.output
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["config"]["calibration"]["tune_steps"] == 2
    assert [block["tuning_kl"] is None for block in report["blocks"]] == [False, True]


def _tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_interrupted_command_goes_on_where_it_stopped(tiny_model_dir, text, tmp_path, monkeypatch):
    out = tmp_path / "packed"
    arguments = ("quantize", tiny_model_dir, "--out", out, "--dataset", text, *OPTIONS)
    quantize = hf_pcdvq.calibration.run.quantize_layers
    names = []

    def broken(layers, *rest):
        if any(name.startswith("model.layers.1.") for name in layers):
            raise RuntimeError("the power went")
        return quantize(layers, *rest)

    def watched(layers, *rest):
        names.extend(layers)
        return quantize(layers, *rest)

    monkeypatch.setattr(hf_pcdvq.calibration.run, "quantize_layers", broken)
    fail(1, "the power went", *arguments)
    assert {path.name for path in tmp_path.iterdir()} == {".packed.calibration", "text.txt"}
    fail(1, "belongs to another run", *arguments, "--setting", "pcdvq-2.0")

    monkeypatch.setattr(hf_pcdvq.calibration.run, "quantize_layers", watched)
    succeed(*arguments)
    assert {name.split(".")[2] for name in names} == {"1"}
    assert {path.name for path in tmp_path.iterdir()} == {"packed", "text.txt"}


def test_other_run_in_the_work_folder_is_replaced_with_force(tiny_model_dir, text, tmp_path, monkeypatch):
    arguments = ("quantize", tiny_model_dir, "--out", tmp_path / "packed", "--dataset", text, *OPTIONS)
    quantize = hf_pcdvq.calibration.run.quantize_layers

    def broken(layers, *rest):
        if any(name.startswith("model.layers.1.") for name in layers):
            raise RuntimeError("the power went")
        return quantize(layers, *rest)

    monkeypatch.setattr(hf_pcdvq.calibration.run, "quantize_layers", broken)
    fail(1, "the power went", *arguments)
    monkeypatch.setattr(hf_pcdvq.calibration.run, "quantize_layers", quantize)
    other = (*arguments, "--setting", "pcdvq-2.0")
    fail(1, "belongs to another run, which differs in the settings. Delete", *other)
    succeed(*other, "--force")
    assert {path.name for path in tmp_path.iterdir()} == {"packed", "text.txt"}
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["bits"] == 2.0


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_model_is_saved_before_it_is_compared(tiny_model_dir, text, tmp_path, monkeypatch, failure):
    def fails(*args):
        raise failure

    monkeypatch.setattr(hf_pcdvq.calibration.held_out, "compare_logits", fails)
    out = tmp_path / "packed"
    result = run("quantize", tiny_model_dir, "--out", out, "--dataset", text, *OPTIONS)
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["comparison"] is None
    if isinstance(failure, RuntimeError):
        assert result.exit_code == 0
        assert report["comparison_failure"] == "RuntimeError: out of memory"
        assert "the comparison with the original failed: RuntimeError: out of memory" in result.output
    AutoModelForCausalLM.from_pretrained(out)
    assert {path.name for path in tmp_path.iterdir()} == {"packed", "text.txt"}


def test_full_disk_is_named_and_costs_no_block(tiny_model_dir, text, tmp_path):
    arguments = ("quantize", tiny_model_dir, "--out", tmp_path / "packed", *OPTIONS)
    data = ("--dataset", text)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))  # enough for the blocks, not for the model
    try:
        # Read part by part, the model has its files before its first block is calibrated.
        early = fail(1, "packed.partial/model.safetensors of ", *arguments, *data)
        assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]
        late = fail(1, "packed.partial: ", *arguments)
        assert "File too large" in early.stderr and "File too large" in late.stderr
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file.name for file in (tmp_path / ".packed.calibration").iterdir()} == {
        "block-0000.safetensors",
        "block-0001.safetensors",
        "windows.safetensors",
    }
    succeed(*arguments)


def test_model_is_read_part_by_part_or_a_line_says_why_not(tiny_model_dir, text, tmp_path):
    whole = succeed("quantize", tiny_model_dir, "--out", tmp_path / "whole", *OPTIONS)
    parts = succeed("quantize", tiny_model_dir, "--out", tmp_path / "parts", *OPTIONS, "--dataset", text)
    assert "loaded into memory whole: it writes its calibration text itself" in whole.stderr
    assert "whole" not in parts.stderr


def test_without_data_the_model_writes_it(tiny_model_dir, tmp_path):
    succeed("quantize", tiny_model_dir, "--out", tmp_path / "packed", *OPTIONS)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config["calibration"]["dataset"] is None
    assert config["calibration"]["samples"] == 8


def test_work_folder_keeps_what_else_is_in_it(tiny_model_dir, text, tmp_path):
    mine = tmp_path / "work" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    options = ("--dataset", text, *OPTIONS, "--work-dir", mine.parent)
    succeed("quantize", tiny_model_dir, "--out", tmp_path / "packed", *options)
    assert [file.name for file in mine.parent.iterdir()] == ["mine.txt"]


def test_text_that_the_model_wrote_is_kept_for_the_next_try(tiny_model_dir, tmp_path, monkeypatch):
    arguments = ("quantize", tiny_model_dir, "--out", tmp_path / "packed", *OPTIONS)
    quantize = hf_pcdvq.calibration.run.quantize_layers

    def broken(*args):
        raise RuntimeError("the power went")

    monkeypatch.setattr(hf_pcdvq.calibration.run, "quantize_layers", broken)
    fail(1, "the power went", *arguments)
    assert [file.name for file in (tmp_path / ".packed.calibration").iterdir()] == ["windows.safetensors"]
    monkeypatch.setattr(hf_pcdvq.calibration.run, "quantize_layers", quantize)
    monkeypatch.setattr(hf_pcdvq.calibration.model, "sample_from_model", broken)
    succeed(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


@pytest.mark.parametrize(
    "option", [("--dataset", "text.txt"), ("--samples", "3"), ("--seed", "1"), ("--tune-steps", "1")]
)
def test_calibration_options_beside_no_calibration_are_wrong_usage(tiny_model_dir, tmp_path, option):
    fail(
        2,
        "--no-calibration excludes",
        "quantize",
        tiny_model_dir,
        "--out",
        tmp_path / "o",
        "--no-calibration",
        *option,
    )


@pytest.mark.parametrize("options", [(), ("--force",)])
def test_a_process_that_is_numbered_and_alone_touches_no_model(tiny_model_dir, text, tmp_path, monkeypatch, options):
    out = tmp_path / "packed"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"of someone else")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    fail(1, "WORLD_SIZE=2", "quantize", tiny_model_dir, "--out", out, "--dataset", text, *OPTIONS, *options)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {"model.safetensors": b"of someone else"}


def test_missing_file_is_named_and_nothing_is_left(tiny_model_dir, tmp_path):
    fail(
        1,
        "there is no calibration file nowhere.txt",
        "quantize",
        tiny_model_dir,
        "--out",
        tmp_path / "o",
        "--dataset",
        "nowhere.txt",
    )
    assert list(tmp_path.iterdir()) == []
