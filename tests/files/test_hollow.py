"""Files that are laid out first and filled afterwards."""

import re

import pytest
import torch
from safetensors.torch import load_file

from hf_pcdvq.files.headers import read_header, rewrite_metadata
from hf_pcdvq.files.hollow import HollowFiles, lay_out

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.int32)}


def unchanged(metadata, names):
    return metadata


@pytest.fixture
def file(tmp_path):
    lay_out(
        {name: tensor.to("meta") for name, tensor in TENSORS.items()}, tmp_path / "model.safetensors", {"text": "?"}
    )
    return tmp_path / "model.safetensors"


def test_a_filled_file_holds_the_tensors_and_the_last_metadata(file):
    files = HollowFiles([file])
    for name, tensor in TENSORS.items():
        files.write(name, tensor)
    files.finish(lambda metadata, names: {"text": str(len(list(names)))})
    found = load_file(file)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert read_header(file).metadata == {"text": "2"}


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(3, 2), "'a' has a place for torch.float32 [2, 3], got torch.float32 [3, 2]"),
        (
            torch.zeros(2, 3, dtype=torch.float16),
            "'a' has a place for torch.float32 [2, 3], got torch.float16 [2, 3]",
        ),
    ],
)
def test_a_tensor_of_another_kind_is_refused_and_its_place_stays_empty(tensor, reason, file):
    files, before = HollowFiles([file]), file.read_bytes()
    with pytest.raises(ValueError, match=re.escape(reason)):
        files.write("a", tensor)
    assert file.read_bytes() == before
    files.write("a", TENSORS["a"])


def test_a_tensor_is_written_once(file):
    files = HollowFiles([file])
    files.write("a", TENSORS["a"])
    with pytest.raises(ValueError, match=r"'a' has a place for torch.float32 \[2, 3\], filled already"):
        files.write("a", torch.zeros(2, 3))
    files.write("b", TENSORS["b"])
    files.finish(unchanged)
    assert torch.equal(load_file(file)["a"], TENSORS["a"])


def test_a_file_with_an_empty_place_is_not_finished(file):
    files = HollowFiles([file])
    files.write("a", TENSORS["a"])
    with pytest.raises(ValueError, match="tensors were never written: b"):
        files.finish(unchanged)


def test_metadata_of_another_length_are_refused_and_the_file_is_unchanged(file):
    before = file.read_bytes()
    with pytest.raises(ValueError, match="the header changed its length"):
        rewrite_metadata(file, lambda metadata: {"text": 100 * "long"})
    assert file.read_bytes() == before


def test_a_disk_that_is_too_small_is_found_when_files_are_laid_out(tmp_path):
    huge = {"a": torch.empty(1 << 60, device="meta")}
    with pytest.raises(OSError, match="model.safetensors of .* bytes could not be made"):
        lay_out(huge, tmp_path / "model.safetensors", {})
