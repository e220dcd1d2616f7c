"""`hf-pcdvq recover` and `hf-pcdvq quantize --recover`."""

import json
import shutil

import pytest
import torch
from command_line import fail, succeed
from conftest import byte_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_pcdvq.calibration.held_out import HeldOut
from hf_pcdvq.evaluation.metrics import evaluate
from hf_pcdvq.files.provenance import Provenance
from hf_pcdvq.recovery import recover as recovery

STEPS = ("--steps", "4", "--batch", "1", "--learning-rate", "0.02")


@pytest.fixture(scope="module")
def packed(tiny_model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("recover") / "packed"
    succeed("quantize", tiny_model_dir, "--out", out, "--no-calibration", "--setting", "pcdvq-2.0")
    return out


def test_recovered_folder_is_a_packed_model_that_is_closer_to_its_original(packed, tiny_model_dir, text, tmp_path):
    out = tmp_path / "recovered"
    options = ("--dataset", text, "--held-out", text, "--length", "32", *STEPS)
    result = succeed("recover", packed, "--teacher", tiny_model_dir, "--out", out, *options)
    assert f"Saved in {out}: 4 steps" in result.output and "recovery: step 4/4" in result.output
    # The state beside it is gone.
    assert {path.name for path in tmp_path.iterdir()} == {"recovered", "text.txt"}
    teacher = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    ids = torch.tensor(byte_tokenizer()(text.read_text()[:64])["input_ids"])[None]
    before, after = (
        evaluate(teacher, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids, progress=False)
        for folder in (packed, out)
    )
    assert after.kl_mean < before.kl_mean
    assert (out / "model.safetensors").stat().st_size == (packed / "model.safetensors").stat().st_size
    kept, made = Provenance.read(out), Provenance.read(packed)
    assert kept.command == made.command
    assert kept.recovery.command.startswith(
        "hf-pcdvq recover packed --teacher model --out recovered --dataset text.txt"
    )
    assert (kept.recovery.steps, kept.recovery.text) == (4, "text.txt")
    succeed("check", out)


def test_figures_are_printed_as_json(packed, tiny_model_dir, text, tmp_path):
    options = ("--dataset", text, "--length", "32", *STEPS, "--json", "--quiet")
    result = succeed("recover", packed, "--teacher", tiny_model_dir, "--out", tmp_path / "out", *options)
    figures = json.loads(result.stdout)
    assert len(figures["losses"]) == 4 and figures["after"]["kl_mean"] < figures["before"]["kl_mean"]
    assert figures["total_seconds"] > figures["seconds"] > 0
    assert not result.stderr


def test_the_dtype_of_the_original_is_not_that_of_the_result(packed, tiny_model_dir, text, tmp_path):
    options = ("--dataset", text, "--held-out", text, "--length", "32", *STEPS, "--dtype", "bfloat16")
    succeed("recover", packed, "--teacher", tiny_model_dir, "--out", tmp_path / "out", *options)
    before, after = (load_file(folder / "model.safetensors") for folder in (packed, tmp_path / "out"))
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: tensor.dtype for name, tensor in before.items()
    }
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_an_existing_folder_is_kept(packed, tiny_model_dir, text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    options = ("--teacher", tiny_model_dir, "--out", tmp_path / "out", "--dataset", text)
    fail(1, "is not empty", "recover", packed, *options)
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_a_folder_that_is_not_packed_is_refused(tiny_model_dir, text, tmp_path):
    options = ("--teacher", tiny_model_dir, "--out", tmp_path / "out", "--dataset", text)
    fail(1, "is not packed", "recover", tiny_model_dir, *options)
    assert not (tmp_path / "out").exists()


def test_a_teacher_with_another_tokenizer_is_refused(packed, tiny_model_dir, text, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "other")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "other")
    options = ("--teacher", tmp_path / "other", "--out", tmp_path / "out", "--dataset", text)
    fail(1, "numbers tokens differently", "recover", packed, *options)


def test_quantizing_and_recovering_is_one_command(tiny_model_dir, text, tmp_path):
    out = tmp_path / "packed"
    calibration = ("--dataset", text, "--samples", "4", "--length", "32", "--setting", "pcdvq-2.0")
    steps = (*STEPS, "--learning-rate", "0.002")
    result = succeed("quantize", tiny_model_dir, "--out", out, *calibration, "--recover", *steps, "--held-out", text)
    assert "Recovered in" in result.output
    assert "loaded into memory whole: --recover trains it towards its original" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"packed", "text.txt"}
    recovery = Provenance.read(out).recovery
    assert (recovery.steps, recovery.text, recovery.held_out) == (4, "text.txt", "text.txt")
    assert recovery.kl_after < recovery.kl_before


def test_what_a_model_is_compared_on_it_is_not_trained_on(tiny_model_dir, text, tmp_path, monkeypatch):
    trained, compared = [], []
    run, compare = recovery.Training.__init__, HeldOut.__init__
    monkeypatch.setattr(
        recovery.Training, "__init__", lambda self, *args, **kw: (trained.append(args[3]), run(self, *args, **kw))[1]
    )
    monkeypatch.setattr(HeldOut, "__init__", lambda self, *args: (compared.append(args[2]), compare(self, *args))[1])
    for name, dataset in (("given", ("--dataset", text)), ("own", ())):
        calibration = (
            *dataset,
            "--samples",
            "4",
            "--length",
            "32",
            "--setting",
            "pcdvq-2.0",
        )
        succeed(
            "quantize",
            tiny_model_dir,
            "--out",
            tmp_path / name,
            *calibration,
            "--recover",
            *STEPS,
            "--steps",
            "14",
            "--held-out",
            text,
        )
    assert Provenance.read(tmp_path / "own").recovery.text == "text that the original wrote"
    assert len(trained) == len(compared) == 2
    for used, kept in zip(trained, compared):
        assert len(used) == 4 and len(kept) == 8
        assert not {tuple(row) for row in used.tolist()} & {tuple(row) for row in kept.tolist()}


def test_a_held_out_text_that_is_too_short_is_refused_before_the_calibration(tiny_model_dir, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    options = ("--recover", "--held-out", tmp_path / "short.txt")
    fail(1, "the held-out text cannot be judged on", "quantize", tiny_model_dir, "--out", tmp_path / "out", *options)
    assert not (tmp_path / ".out.calibration").exists()


def test_the_original_is_never_replaced(packed, tiny_model_dir, text, tmp_path):
    teacher = tmp_path / "original"
    shutil.copytree(tiny_model_dir, teacher)
    options = ("--teacher", teacher, "--out", teacher, "--dataset", text, "--length", "32", *STEPS, "--force")
    fail(1, "is or contains the source model's folder", "recover", packed, *options)
    assert (teacher / "model.safetensors").read_bytes() == (tiny_model_dir / "model.safetensors").read_bytes()


def test_several_processes_are_refused(packed, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    command = ("recover", packed, "--teacher", tiny_model_dir, "--out", tmp_path / "out")
    fail(1, "neither torchrun nor accelerate launch has started this process", *command)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # as torchrun sets it
    fail(2, "runs in one process", *command)


def test_options_of_recovery_need_it(tiny_model_dir, tmp_path):
    fail(2, "--steps needs --recover", "quantize", tiny_model_dir, "--out", tmp_path / "out", "--steps", "3")
