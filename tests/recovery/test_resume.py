"""A recovery that was killed and is started again gives the same model, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from packed_pairs import pair, tensors, windows
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_pcdvq import Recovery, recover
from hf_pcdvq.recovery import training
from hf_pcdvq.recovery.state import clear

SETTINGS = Recovery(steps=8, batch=2, learning_rate=0.01, evaluations=4)
TEXT, HELD_OUT = windows(5), windows(2, seed=1)  # every window comes three times


@pytest.fixture(autouse=True)
def _state_after_every_step(monkeypatch):
    monkeypatch.setattr(training, "_SAVE", 0.0)


def _run(folder: Path, work_dir: Path | None, stop: int | None = None, settings=SETTINGS, text=TEXT, **options):
    """The tensors of a recovered model, and how often the teacher ran; with `stop`, interrupted at that step."""
    packed, teacher = pair(folder)
    calls, steps = [], []
    teacher.model.register_forward_pre_hook(lambda *_: calls.append(1))

    def interrupt(module, args, output):
        steps.append(output.requires_grad)
        if stop is not None and sum(steps) == stop * settings.batch:
            raise KeyboardInterrupt
        return output

    packed.model.norm.register_forward_hook(interrupt)
    common = {"held_out": HELD_OUT, "settings": settings, "progress": False, "work_dir": work_dir}
    report = recover(packed, teacher, None, text, **common, **options)
    return tensors(packed), len(calls), report


def _same(a, b) -> bool:
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("stop", [1, 4, 8])
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(tiny_model_dir, tmp_path, stop):
    expected, _, wanted = _run(tiny_model_dir, None)
    with pytest.raises(KeyboardInterrupt):
        _run(tiny_model_dir, tmp_path, stop)
    found, _, report = _run(tiny_model_dir, tmp_path)
    assert _same(found, expected)
    assert report.losses == wanted.losses and report.evaluations == wanted.evaluations
    clear(tmp_path)
    assert not tmp_path.exists()


def test_a_finished_run_is_not_run_again(tiny_model_dir, tmp_path):
    expected, _, _ = _run(tiny_model_dir, tmp_path)
    steps = []
    packed, teacher = pair(tiny_model_dir)
    packed.model.norm.register_forward_hook(lambda *_: steps.append(1))
    recover(packed, teacher, None, TEXT, held_out=HELD_OUT, settings=SETTINGS, progress=False, work_dir=tmp_path)
    assert not steps and _same(tensors(packed), expected)


def test_another_run_is_refused_or_replaced(tiny_model_dir, tmp_path):
    _run(tiny_model_dir, tmp_path)
    with pytest.raises(
        ValueError, match="belongs to another run, which differs in the text. Delete it or use --force"
    ):
        _run(tiny_model_dir, tmp_path, text=windows(5, seed=2))
    other = Recovery(steps=3, batch=1)
    with pytest.raises(ValueError, match="which differs in the settings and the text. Delete it"):
        _run(tiny_model_dir, tmp_path, settings=other)
    _, _, report = _run(tiny_model_dir, tmp_path, settings=other, restart=True)
    assert report.steps == 3


def test_a_damaged_state_is_refused(tiny_model_dir, tmp_path):
    _run(tiny_model_dir, tmp_path)
    (tmp_path / "recovery.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="recovery.safetensors is damaged"):
        _run(tiny_model_dir, tmp_path)


def test_a_state_that_lacks_a_tensor_is_damaged(tiny_model_dir, tmp_path):
    _run(tiny_model_dir, tmp_path)
    file = tmp_path / "recovery.safetensors"
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "best"}, file, metadata)
    with pytest.raises(ValueError, match=r"recovery.safetensors is damaged \(it lacks best\)"):
        _run(tiny_model_dir, tmp_path)


def test_only_what_a_run_has_written_is_deleted(tiny_model_dir, tmp_path):
    mine = [tmp_path / name for name in ("teacher/model", "windows.safetensors", ".recovery-logits/notes")]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    _run(tiny_model_dir, tmp_path)
    clear(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(mine)


def test_a_run_that_is_refused_loses_no_logits(tiny_model_dir, tmp_path):
    _run(tiny_model_dir, tmp_path)
    before = {file: file.read_bytes() for file in (tmp_path / ".recovery-logits").iterdir()}
    with pytest.raises(ValueError, match="belongs to another run"):
        _run(tiny_model_dir, tmp_path, text=windows(5, seed=2))
    assert {file: file.read_bytes() for file in (tmp_path / ".recovery-logits").iterdir()} == before


def test_the_originals_logits_are_kept_within_the_bound_and_change_nothing(tiny_model_dir, tmp_path):
    def run(name: str, cache_bytes: int):
        settings = Recovery(**{**SETTINGS.to_dict(), "cache_bytes": cache_bytes})
        found = _run(tiny_model_dir, tmp_path / name, settings=settings)
        return found[0], found[1], sum(1 for _ in (tmp_path / name).glob(".recovery-logits/logits-*.safetensors"))

    logits = 24 * 258 * 4  # bytes of one window
    computed, calls, files = run("none", 0)
    kept, fewer, some = run("some", 3 * logits + 10)
    _, fewest, every = run("all", 100 * logits)
    assert (files, some, every) == (0, 3, 5)
    assert fewest < fewer < calls
    assert _same(kept, computed)


def test_kept_logits_that_are_damaged_are_computed_again(tiny_model_dir, tmp_path):
    expected, _, _ = _run(tiny_model_dir, None)
    with pytest.raises(KeyboardInterrupt):
        _run(tiny_model_dir, tmp_path, 3)
    (tmp_path / ".recovery-logits/logits-000001.safetensors").write_bytes(b"half")
    assert _same(_run(tiny_model_dir, tmp_path)[0], expected)


def test_kept_logits_of_another_original_are_not_used(tiny_model_dir, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _run(tiny_model_dir, tmp_path, 1)
    file = tmp_path / ".recovery-logits/logits-000000.safetensors"
    save_file({"logits": load_file(file)["logits"] * 0}, file)
    owner = tmp_path / ".recovery-logits/identity.json"
    owner.write_text(json.dumps({**json.loads(owner.read_text()), "the teacher's weights": "other"}))
    assert _same(_run(tiny_model_dir, tmp_path)[0], _run(tiny_model_dir, None)[0])
