"""Adding a packed format takes edits in at most six places: adds the toy one to a copy of the packages.

CONTRIBUTING.md lists the places.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "tests" / "toy_format"
KERNELS = "kernels/torch-ext/hf_pcdvq_kernels"
# New files, by destination.
NEW = {
    f"{KERNELS}/formats/toy.py": "description.py",
    f"{KERNELS}/reference/toy.py": "reference.py",
    f"{KERNELS}/triton/toy.py": "kernels.py",
    "hf_pcdvq/codecs/toy.py": "codec.py",
}
# Entries in the two tables, with the import that each needs.
TABLES = {
    f"{KERNELS}/formats/__init__.py": (
        ("from .stream import StreamWeight\n", "from .stream import StreamWeight\nfrom .toy import ToyWeight\n"),
        ("StreamWeight, Int8Weight)", "StreamWeight, Int8Weight, ToyWeight)"),
    ),
    "hf_pcdvq/codecs/__init__.py": (
        ("from .stream import StreamCodec\n", "from .stream import StreamCodec\nfrom .toy import ToyCodec\n"),
        ("StreamCodec, ScalarCodec)", "StreamCodec, ScalarCodec, ToyCodec)"),
    ),
}


def copy_with_the_toy(root):
    """The packages with the toy format added."""
    for package in ("hf_pcdvq", "hf_pcdvq_cli", KERNELS):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    for target, source in NEW.items():
        shutil.copy(TOY / source, root / target)
    for target, edits in TABLES.items():
        text = (root / target).read_text()
        for old, new in edits:
            assert text.count(old) == 1, (target, old)
            text = text.replace(old, new)
        (root / target).write_text(text)


def test_a_format_is_added_in_six_places_and_works_everywhere(tiny_model_dir, tmp_path):
    assert len(NEW) + len(TABLES) <= 6
    copy_with_the_toy(tmp_path / "tree")
    path = os.pathsep.join(str(tmp_path / "tree" / folder) for folder in ("", Path(KERNELS).parent))
    done = subprocess.run(
        [sys.executable, TOY / "check.py", tiny_model_dir, tmp_path],
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr


def test_contributing_lists_the_places():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for place in [*NEW, *TABLES]:
        listed = place.replace("toy.py", "<name>.py").replace(f"{KERNELS}/", "hf_pcdvq_kernels/")
        assert listed in text, listed
