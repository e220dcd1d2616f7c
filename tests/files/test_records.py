"""The record files next to a model: written atomically, and readable by older and newer versions."""

import json
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest

from hf_pcdvq.files.provenance import NAME, Provenance
from hf_pcdvq.files.records import write_text


def test_full_disk_leaves_the_older_file_and_is_told_with_its_name(tmp_path):
    """A file size limit fails like a full disk, with an error from write()."""
    file = tmp_path / "record.json"
    write_text(file, "older")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{file} could not be written: File too large"):
            write_text(file, "newer" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
    assert file.read_text() == "older"


def test_two_processes_of_one_id_write_one_file(tmp_path):
    """Containers that share a folder have the same process ids."""
    file = tmp_path / "record.json"

    def write(number):
        for _ in range(30):
            write_text(file, f"{number}" * 1_000_000)
            assert set(file.read_text()) in ({"0"}, {"1"})

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_fields_that_a_later_version_has_added_are_passed_over(tmp_path):
    made = Provenance("org/tiny", "abc", "hf-pcdvq quantize org/tiny", {"torch": "2"}, {"license": "mit"})
    made.write(tmp_path)
    content = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps({**content, "colour": "blue"}))
    assert Provenance.read(tmp_path) == made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 2}', "expected a record of format 1, found format 2; create it again, or upgrade"),
        (
            '{"format": 1, "original": null}',
            "the record is incomplete, it lacks revision, command, versions, inherited",
        ),
        ("[]", "found format None"),
        ('{"format"', "Expecting"),
    ],
)
def test_files_that_are_no_records_are_named(tmp_path, text, message):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path / NAME}: .*{message}"):
        Provenance.read(tmp_path)
