"""test_shared_input.py where there is no GPU. See `interpreted.py`."""

from pathlib import Path

from interpreted import run, without_gpu


@without_gpu
def test_interpreted():
    run(Path(__file__).with_name("test_shared_input.py"))
