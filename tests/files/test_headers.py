"""Damaged safetensors headers and indexes: one error each, which names the file, the tensor and the field."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from hf_pcdvq.files.headers import checkpoint_files, read_header, read_headers

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(file, header, data=bytes(24)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_a_header_is_read(tmp_path):
    file = tmp_path / "x.safetensors"
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "empty": torch.zeros(0, 5)}
    save_file(tensors, file, {"who": "me"})
    header = read_header(file)
    assert header.metadata == {"who": "me"}
    assert {name: (found.dtype, found.shape) for name, found in header.tensors.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    found = header.tensors["b"]
    assert (
        file.read_bytes()[found.start : found.start + found.nbytes]
        == tensors["b"].view(torch.uint8).numpy().tobytes()
    )


@pytest.mark.parametrize(
    "header, message",
    [
        (b"{ ", "the header is damaged: Expecting property name"),
        (b'{"\xff": 1}', "the header is damaged: 'utf-8' codec"),
        (b"[" * 100_000, "the header is damaged: "),
        (b"[1]", "the header is damaged: expected an object, found a list"),
        (b'{"a": 1, "a": 2}', "the header is damaged: 'a' is there twice"),
        ({"__metadata__": {"x": 1}}, "__metadata__ must map names to texts"),
        ({"a": 3}, "tensor 'a': dtype must be the name of a dtype, got None"),
        ({"a": {**GOOD, "dtype": ["F32"]}}, r"tensor 'a': dtype must be the name of a dtype, got \['F32'\]"),
        ({"a": {**GOOD, "shape": [2, -3]}}, r"tensor 'a': shape must be a list of sizes, got \[2, -3\]"),
        ({"a": {**GOOD, "shape": [2.0, 3]}}, "tensor 'a': shape must be a list of sizes"),
        ({"a": {**GOOD, "shape": True}}, "tensor 'a': shape must be a list of sizes, got True"),
        ({"a": {**GOOD, "data_offsets": [0]}}, r"tensor 'a': data_offsets must be two positions, got \[0\]"),
        ({"a": {**GOOD, "data_offsets": [0, 20]}}, "tensor 'a': data_offsets .* do not fit its dtype F32 and shape"),
        ({"a": {**GOOD, "data_offsets": [24, 0]}}, "tensor 'a': data_offsets .* do not fit"),
        ({"a": {**GOOD, "data_offsets": [4, 28]}}, "is truncated: tensor 'a' ends at byte"),
        ({"a": GOOD, "b": GOOD}, "tensor 'b' starts at byte .*; the header is damaged"),
        ({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}, "4 bytes at the end belong to no tensor"),
        ({"a\x1b[2J": GOOD}, r"'a\\x1b\[2J' is no name of a tensor"),
    ],
)
def test_a_damaged_header_is_named(tmp_path, header, message):
    file = tmp_path / "x.safetensors"
    write(file, header)
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        read_header(file)


def test_a_tensor_in_two_files_is_named(tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        write(file, {"x": GOOD})
    with pytest.raises(ValueError, match=f"tensor 'x' is in {files[0]} and in {files[1]}"):
        read_headers(files)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "Expecting property name"),
        ("[]", "expected a JSON object, found a list"),
        ("{}", "weight_map must map names of tensors to files, got None"),
        ('{"weight_map": ["a"]}', r"weight_map must map names of tensors to files, got \['a'\]"),
        ('{"weight_map": {"a": 3}}', r"weight_map\['a'\] must be a safetensors file in this folder, got 3"),
        ('{"weight_map": {"a": "../a.safetensors"}}', r"must be a safetensors file in this folder, got '../a"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "must be a safetensors file in this folder, got '/etc/passwd'"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, content, message):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match=f"{index}: .*{message}"):
        checkpoint_files(tmp_path)
