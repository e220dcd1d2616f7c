"""hf_pcdvq.streaming.freed_memory"""

import ctypes
import subprocess
import sys

import pytest

# Pieces below the size from which glibc asks the system for each, every second one of which is freed.
SCRIPT = """
from hf_pcdvq.streaming.freed_memory import return_freed_memory

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

before = resident()
kept, freed = [], []
for _ in range(2000):
    freed.append(bytearray(b"x" * 60_000))
    kept.append(bytearray(600))
full = resident()
freed.clear()
held = resident()
return_freed_memory()
print(full - before, held - before, resident() - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="memory as glibc manages it"
)
def test_what_is_free_between_pieces_in_use_goes_back():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    full, held, returned = map(int, done.stdout.split())
    assert full > 100_000  # kilobytes
    assert returned < full / 4 < held
