"""Resuming: only finished blocks that are whole and of the same run are used."""

import json
import resource
from dataclasses import replace

import pytest
import torch
from conftest import tiny_llama

from hf_pcdvq import Calibration, PcdvqConfig, quantize_model
from hf_pcdvq.allocation.store import kept_until_done
from hf_pcdvq.calibration import identity, store

TOKENS = torch.randint(2, 250, (6, 16), generator=torch.Generator().manual_seed(0))
SETTINGS = Calibration(samples=4, length=16, holdout=2)


def quantize(folder, model=None, tokens=TOKENS, settings=SETTINGS, **options):
    model = model or tiny_llama()
    return quantize_model(
        model, None, PcdvqConfig(calibration=settings), tokens, work_dir=folder, progress=False, **options
    )


@pytest.fixture
def finished(tmp_path):
    """The work folder of a run, and the state of its result."""
    model = quantize(tmp_path / "work")
    return tmp_path / "work", {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_state(model, expected):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name in expected:
        assert torch.equal(state[name], expected[name]), name


def changed(name, row):
    """The tiny model with one weight changed."""
    model = tiny_llama()
    with torch.no_grad():
        model.get_parameter(name)[row] += 1
    return model


def heads():
    model = tiny_llama()
    model.config.rope_parameters["rope_theta"] = 500.0
    return model


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"model": changed("model.layers.1.mlp.down_proj.weight", 5)}, "the model's weights"),  # not the first row
        ({"model": changed("model.norm.weight", 3)}, "the model's weights"),  # a tensor that is not quantized
        ({"model": tiny_llama().half()}, "the model's weights"),
        ({"model": heads()}, "the model's config"),
        ({"tokens": TOKENS.flip(0)}, "the calibration data"),
        ({"batch_tokens": 32}, "the number of windows at once"),
        ({"settings": Calibration(samples=4, length=16, holdout=2, damp_percent=0.02)}, "the settings"),
    ],
)
def test_blocks_of_another_run_are_refused_by_what_differs(finished, options, difference):
    folder, _ = finished
    with pytest.raises(ValueError, match=f"belongs to another run, which differs in {difference}"):
        quantize(folder, **options)


def test_other_version_of_a_package_is_another_run(finished, monkeypatch):
    monkeypatch.setattr(identity, "package_versions", lambda: {"hf_pcdvq": "99"})
    with pytest.raises(ValueError, match="differs in the versions of packages"):
        quantize(finished[0])


def test_windows_to_measure_on_and_the_name_of_the_text_may_change(finished):
    folder, expected = finished
    settings = Calibration(dataset="other name", samples=4, length=16, holdout=1)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert_state(quantize(folder, tokens=TOKENS[:5], settings=settings), expected)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_restart_computes_again_what_does_not_fit(finished, tmp_path):
    folder, _ = finished
    name = "model.layers.1.mlp.down_proj.weight"
    again = quantize(folder, model=changed(name, 5), restart=True)
    assert_state(again, quantize(tmp_path / "other", model=changed(name, 5)).state_dict())


def flip(content):
    content[len(content) // 2] ^= 1


def cut(content):
    del content[-100:]


def cut_header(content):
    del content[20:]


@pytest.mark.parametrize("damage", [flip, cut, cut_header])
def test_damaged_block_is_named_and_computed_again_with_those_after_it(finished, damage, caplog):
    folder, expected = finished
    file = folder / "block-0000.safetensors"
    content = bytearray(file.read_bytes())
    damage(content)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        quantize(folder)
    assert_state(quantize(folder, restart=True), expected)
    assert f"{file} is damaged" in caplog.text


def test_block_under_the_name_of_another_is_damaged(finished):
    folder, _ = finished
    (folder / "block-0000.safetensors").replace(folder / "block-0001.safetensors")
    with pytest.raises(ValueError, match=r"block-0001.safetensors is damaged \(its checksum"):
        quantize(folder)


def test_text_that_another_model_wrote_is_not_calibrated_on(tmp_path):
    settings = Calibration(samples=2, length=8, holdout=0)
    quantize(tmp_path, tokens=None, settings=settings)
    with pytest.raises(
        ValueError, match=r"windows.safetensors belongs to another run, which differs in the model's w"
    ):
        quantize(tmp_path, changed("model.norm.weight", 3), tokens=None, settings=settings)


def test_disk_that_is_full_is_named_with_the_file(finished):
    folder, _ = finished
    result = store.BlockStore(folder, {}, restart=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    records = store.QuantizedLayers({"layer": {"weight": {"": torch.zeros(1 << 18)}}}, [])
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))
    try:
        with pytest.raises(OSError, match=r"block-0003.safetensors could not be written: .*File too large"):
            result.save(3, records)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(folder.iterdir()) == []


def test_remains_of_a_killed_run_are_cleared(tmp_path):
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / ".tmpA1b2C3").write_text("what the safetensors library was writing")
    quantize(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"block-0000.safetensors", "block-0001.safetensors"}
    (tmp_path / ".partial").mkdir()
    store.clear(tmp_path)
    assert not tmp_path.exists()


def test_folder_of_a_failed_run_stays_unless_it_is_empty(tmp_path):
    kept, empty = tmp_path / "kept", tmp_path / "empty"
    quantize(kept)
    empty.mkdir()
    for folder in (kept, empty):
        with pytest.raises(KeyboardInterrupt), kept_until_done(folder):
            raise KeyboardInterrupt
    assert len(list(kept.iterdir())) == 2 and not empty.exists()


def test_only_blocks_that_are_not_finished_need_the_sensitivity_of_the_original(tmp_path, monkeypatch):
    settings = replace(SETTINGS, fisher_groups=2)
    expected = quantize(tmp_path, settings=settings).state_dict()
    sorted(tmp_path.glob("block-*"))[-1].unlink()
    assert_state(quantize(tmp_path, settings=settings), expected)
    backward = []
    monkeypatch.setattr(torch.Tensor, "backward", lambda *args, **kwargs: backward.append(args))
    assert_state(quantize(tmp_path, settings=settings), expected)
    assert not backward


def test_records_come_back_as_they_were(finished):
    folder, _ = finished
    report = [quantize(folder).hf_quantizer.report for _ in range(2)]
    assert json.dumps(report[0].to_dict()["layers"]) == json.dumps(report[1].to_dict()["layers"])
