"""Quantizing and recovering in two processes gives what one gives. One pair of processes does everything, see `sharing_worker.py`."""

import json
import shutil
from pathlib import Path

import pytest
import sharing_worker as worker
import torch
from click.testing import CliRunner
from two_processes import launch, made_once

from hf_pcdvq.calibration.layers import row_parts
from hf_pcdvq_cli import main

pytestmark = pytest.mark.usefixtures("exact_products")


def make(folder: Path) -> None:
    worker.save_models(folder)
    ended = launch(worker.__file__, folder, check=False)
    seen = {"code": ended.returncode, "errors": ended.stderr, "said": ended.stdout}
    (folder / "seen.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the models, what either process has seen, and what the launcher has."""
    folder = made_once(tmp_path_factory, "sharing", make)
    seen = json.loads((folder / "seen.json").read_text())
    assert (folder / "1.pt").exists(), seen["errors"]
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)], seen


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("case", worker.CASES)
def test_two_processes_write_the_files_of_one(runs, case, tmp_path):
    folder, ranks, _ = runs
    report = worker.streamed(folder, case, tmp_path / "alone").report
    assert contents(folder / case) == contents(tmp_path / "alone")
    errors = report and [block.output_error for block in report.blocks]
    assert ranks[0][case] == errors and ranks[1][case] == errors
    # Whoever returned first, they were complete.
    assert ranks[0]["files", case] == ranks[1]["files", case] == contents(folder / case)
    assert [found["compared", case] for found in ranks] == ([(True, None), (False, None)] if report else [None, None])


def test_each_process_has_the_whole_model_in_memory_and_one_can_quantize_alone(runs):
    folder, ranks, _ = runs
    expected = worker.in_memory(folder, "dense").state_dict()
    for found in (ranks[0]["in memory"], ranks[1]["in memory"], ranks[0]["alone"]):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("case", ["dense", "rounded"])
def test_two_processes_resume_where_they_were(runs, case):
    folder, ranks, _ = runs
    assert [found["resumed"][case] for found in ranks] == [[2 if case == "rounded" else 1], []]
    assert contents(folder / f"{case} resumed") == contents(folder / case)


def test_a_killed_process_ends_the_run_and_one_alone_goes_on_with_it(runs, tmp_path, monkeypatch):
    folder, _, seen = runs
    assert seen["code"] != 0 and "Signal 9 (SIGKILL)" in seen["errors"]
    assert seen["said"].count("Saved in") == 1  # by one of the processes, of the run that ended well
    assert not (folder / "killed").exists() and not (folder / ".killed.partial").exists()
    assert [file.name for file in (folder / ".killed.calibration").iterdir()] == ["block-0000.safetensors"]
    assert not (folder / ".command.calibration").exists()
    shutil.copytree(folder / ".killed.calibration", tmp_path / ".resumed.calibration")
    saved, save = [], worker.BlockStore.save
    monkeypatch.setattr(worker.BlockStore, "save", lambda *args: saved.append(args[1]) or save(*args))
    run = CliRunner().invoke(main, worker.command_line(folder, tmp_path / "resumed"))
    assert run.exit_code == 0, run.output
    assert saved == [1, 2]
    found, expected = (path / "model.safetensors" for path in (tmp_path / "resumed", folder / "command"))
    assert found.read_bytes() == expected.read_bytes()


def test_what_takes_the_whole_model_and_too_few_windows_are_refused_by_name(runs):
    for found in runs[1]:
        assert (
            "fisher_groups=2 takes the whole model in one process, and 2 were started" in found["refused"]["fisher"]
        )
        assert "tune_steps=3 takes the whole model in one process" in found["refused"]["tuned"]
        assert "dataset=None" in found["refused"]["unwritten"] and "name a dataset" in found["refused"]["unwritten"]
        assert "8 windows make 1 shares" in found["refused"]["few"] and "start at most 1" in found["refused"]["few"]


def test_processes_that_were_told_different_things_are_refused(runs):
    first, second = (found["refused"] for found in runs[1])
    for what, named in (("settings", "the settings"), ("kept", "the settings"), ("one kept", "work_dir")):
        assert first[what].endswith(f"process 0 and process 1 were started differently: they differ in {named}")
        assert second[what].endswith(f"process 1 and process 0 were started differently: they differ in {named}")


def test_what_fails_in_the_first_process_fails_alike_in_the_other(runs):
    first, second = (found["refused"] for found in runs[1])
    for what, kind, named in (("missing", "FileNotFoundError", "missing.txt"), ("work", "FileExistsError", "a file")):
        assert first[what].startswith(kind) and named in first[what]
        assert second[what] == first[what]


def test_recovery_ends_with_the_model_of_one_process(runs):
    folder, ranks, _ = runs
    alone = worker.recovered(folder / "llama")
    first, second = (found["recovered"] for found in ranks)
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=1e-4, atol=1e-6)
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), name
        torch.testing.assert_close(tensor, alone["model"][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("multiple", "count"), [(1, 3), (256, 3), (256, 8), (1, 1)])
def test_parts_cover_every_row_once_and_cut_no_ring(multiple, count):
    sizes = {"q": 576, "k": 192, "v": 200}
    parts = row_parts(sizes, multiple, count)
    assert len(parts) <= count and all(parts)
    rows = [(name, row) for part in parts for name, cut in part.items() for row in range(cut.start, cut.stop)]
    assert rows == [(name, row) for name, size in sizes.items() for row in range(size)]
    assert all(cut.start % multiple == 0 for part in parts for cut in part.values())
