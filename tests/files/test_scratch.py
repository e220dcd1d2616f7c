"""Temporary folders: deleted by SIGTERM, and after a kill by whoever makes the next one."""

import os
import signal
import subprocess
import sys
import time

import pytest

from hf_pcdvq.files.scratch import scratch_folder

HOLDER = """
import sys, time
from hf_pcdvq.files.scratch import scratch_folder
with scratch_folder(sys.argv[1]) as folder:
    (folder / "weights").write_bytes(bytes(1000))
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds a folder in `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()  # it has one now
    yield process
    process.kill()
    process.wait()


def make_old(folder):
    for left in folder.iterdir():
        os.utime(left, (time.time() - 3600,) * 2)


def test_sigterm_deletes_the_folder_and_ends_the_process(holder, tmp_path):
    holder.terminate()
    assert holder.wait() == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_deleted_by_the_next(holder, tmp_path):
    holder.kill()
    holder.wait()
    (left,) = tmp_path.iterdir()
    make_old(tmp_path)
    with scratch_folder(tmp_path) as folder:
        assert not left.exists() and folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_folder_of_a_living_process_and_foreign_ones_stay(holder, tmp_path):
    (tmp_path / ".hf_pcdvq-mine").mkdir()
    (tmp_path / ".hf_pcdvq-mine" / "notes.txt").write_text("no lock, so not ours")
    make_old(tmp_path)
    before = {path for path in tmp_path.rglob("*")}
    with scratch_folder(tmp_path):
        pass
    assert {path for path in tmp_path.rglob("*")} == before
    assert holder.poll() is None


def test_a_programs_own_handler_of_sigterm_is_kept(tmp_path):
    def own(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, own)
    try:
        with scratch_folder(tmp_path):
            assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    with scratch_folder(tmp_path):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
