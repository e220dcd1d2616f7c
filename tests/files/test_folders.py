"""Writing a folder in place: after any kill there is the old model or the new one, at the latest after the next run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_pcdvq.files.folders import folder_in_place

HOLDER = """
import sys, time
from pathlib import Path
from hf_pcdvq.files.folders import folder_in_place
with folder_in_place(Path(sys.argv[1]), Path("no-source"), False) as folder:
    (folder / "config.json").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def write(out, text, force=True):
    with folder_in_place(out, Path("no-source"), force) as folder:
        (folder / "config.json").write_text(text)


def in_killed_process(work):
    """Run a function in a process that must end by SIGKILL."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)  # not reached
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def dies_at_rename(number, before):
    """`Path.rename` that kills the process at its call with this number."""
    rename, calls = Path.rename, []

    def dying(path, target):
        calls.append(path)
        if before and len(calls) == number:
            die()
        rename(path, target)
        if len(calls) == number:
            die()

    return dying


@pytest.mark.parametrize(
    ("method", "replacement", "kept"),
    [
        ("write_text", die, "old"),  # while the model is being saved
        ("rename", dies_at_rename(1, before=True), "old"),
        ("rename", dies_at_rename(1, before=False), "old"),  # the moment in which there is no folder
        ("rename", dies_at_rename(2, before=False), "new"),  # before the old one is deleted
    ],
)
def test_kill_while_replacing_keeps_one_model_and_does_not_stop_the_next_run(tmp_path, method, replacement, kept):
    out = tmp_path / "out"
    write(out, "old")

    def replace():
        setattr(Path, method, replacement)
        write(out, "new")

    in_killed_process(replace)
    # Whether it may replace what is there is asked again, of what has been put back.
    with pytest.raises(FileExistsError, match="is not empty"):
        write(out, "never", force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "config.json").read_text() == kept
    write(out, "next")
    assert (out / "config.json").read_text() == "next"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_first_run_can_start_again(tmp_path):
    def run():
        with folder_in_place(tmp_path / "out", Path("no-source"), False) as folder:
            (folder / ".tmpA1b2C3").write_text("what the safetensors library was writing")
            die()

    in_killed_process(run)
    write(tmp_path / "out", "whole", force=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "config.json"]


@pytest.fixture
def holder(tmp_path):
    """A process that is writing `out`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()


def test_folder_that_another_process_is_writing_is_refused_and_sigterm_cleans_up(holder, tmp_path):
    with pytest.raises(BlockingIOError, match=f"another process is writing {tmp_path / 'out'}"):
        write(tmp_path / "out", "mine")
    holder.send_signal(signal.SIGTERM)
    assert holder.wait() == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
