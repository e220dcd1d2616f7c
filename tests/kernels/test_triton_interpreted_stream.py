"""The longest part of test_triton_interpreted.py, in a file of its own so that another process can take it."""

from pathlib import Path

from interpreted import run, without_gpu


@without_gpu
def test_interpreted():
    run(Path(__file__).with_name("test_triton.py"), "stream")
