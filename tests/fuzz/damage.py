"""Damage to the folder of a packed model, as a broken disk, a careless edit or a stranger might do it. Seeded by a number."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file

from hf_pcdvq.files.headers import read_header
from hf_pcdvq.files.packing import KEY, save_file

EVIL = "^(([a-z._0-9])+.)+!$"  # catastrophic for a regular expression engine that backtracks
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 7, 2.5, 1e300, float("nan"), 1 << 40, -(1 << 63), "", "x", "../../x", "weight", EVIL, "\x1b[2J",
    [], {}, [[]], [0, 0], [1, 2, 3], ["x"], {"x": 1}, {"x": {"x": []}}, [EVIL], [[EVIL, "int8"]], "9" * 50,
]  # fmt: skip
DEEP = b"[" * 100_000


def _nodes(tree: Any) -> list[tuple[Any, Any]]:
    """All places in a JSON tree, as containers and keys."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, child in children for place in ((tree, key), *_nodes(child))]


def _change_tree(rng: random.Random, tree: Any) -> Any:
    """Replace, delete, rename or copy one node of a JSON tree."""
    places = _nodes(tree)
    if not places or rng.random() < 0.02:
        return rng.choice(JUNK)
    container, key = rng.choice(places)
    action = rng.choice(["replace", "replace", "replace", "delete", "rename", "copy"])
    if action == "replace":
        container[key] = rng.choice(JUNK)
    elif action == "delete":
        del container[key]
    elif action == "copy":
        other, place = rng.choice(places)
        container[key] = other[place]
    elif isinstance(container, dict):
        container[rng.choice(["", "x", f"{key}x", key.upper()])] = container.pop(key)
    else:
        container.reverse()
    return tree


def _text_of(tree: Any) -> bytes:
    try:
        return json.dumps(tree).encode()
    except ValueError:  # a copied node that contains itself
        return DEEP


def _change_bytes(rng: random.Random, content: bytes) -> bytes:
    """Flip a bit, overwrite, insert or delete some bytes, or cut the rest off."""
    position = rng.randrange(len(content))
    action = rng.choice(["flip", "write", "insert", "delete", "cut", "deep"])
    if action == "flip":
        return content[:position] + bytes([content[position] ^ 1 << rng.randrange(8)]) + content[position + 1 :]
    if action == "cut":
        return content[:position]
    if action == "deep":
        return content[:position] + DEEP + content[position:]
    piece = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
    end = position + (0 if action == "insert" else len(piece))
    return content[:position] + (b"" if action == "delete" else piece) + content[end:]


def _file(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def _json_tree(name: str) -> Callable[[random.Random, Path], None]:
    def damage(rng: random.Random, folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_bytes(_text_of(_change_tree(rng, content)))

    return damage


def _json_bytes(name: str) -> Callable[[random.Random, Path], None]:
    def damage(rng: random.Random, folder: Path) -> None:
        (folder / name).write_bytes(_change_bytes(rng, (folder / name).read_bytes()))

    return damage


def quantization_config(rng: random.Random, folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = _change_tree(rng, content["quantization_config"])
    (folder / "config.json").write_bytes(_text_of(content))


def _split(file: Path) -> tuple[bytes, bytes]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length], content[8 + length :]


def _join(file: Path, header: bytes, data: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def header_tree(rng: random.Random, folder: Path) -> None:
    file = _file(rng, folder)
    header, data = _split(file)
    tree = json.loads(header)
    metadata = tree.pop("__metadata__")
    tree = _change_tree(rng, tree)
    _join(file, _text_of({"__metadata__": metadata, **tree} if isinstance(tree, dict) else tree), data)


def header_bytes(rng: random.Random, folder: Path) -> None:
    file = _file(rng, folder)
    header, data = _split(file)
    _join(file, _change_bytes(rng, header), data)


def header_length(rng: random.Random, folder: Path) -> None:
    file = _file(rng, folder)
    length = rng.choice([0, 1, 7, 1 << 20, 1 << 63, rng.randrange(1 << 12)])
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])


def record(rng: random.Random, folder: Path) -> None:
    """The record in the metadata of one file."""
    file = _file(rng, folder)
    header, data = _split(file)
    tree = json.loads(header)
    if rng.random() < 0.1:
        tree["__metadata__"] = _change_tree(rng, tree["__metadata__"])
    else:
        changed = _change_tree(rng, json.loads(tree["__metadata__"][KEY]))
        tree["__metadata__"][KEY] = _text_of(changed).decode()
    _join(file, _text_of(tree), data)


def length(rng: random.Random, folder: Path) -> None:
    """A file that is cut, empty or too long."""
    file = _file(rng, folder)
    content = file.read_bytes()
    file.write_bytes(
        rng.choice([content[: rng.randrange(len(content))], content + b"\0" * rng.randrange(1, 99), b""])
    )


def data(rng: random.Random, folder: Path) -> None:
    """Flipped bits, or tensors of the same size that are swapped."""
    file = _file(rng, folder)
    content = bytearray(file.read_bytes())
    tensors = list(read_header(file).tensors.values())
    first = rng.choice(tensors)
    same = [tensor for tensor in tensors if tensor.nbytes == first.nbytes and tensor is not first]
    if same and rng.random() < 0.5:
        places = [slice(tensor.start, tensor.start + tensor.nbytes) for tensor in (first, rng.choice(same))]
        content[places[0]], content[places[1]] = content[places[1]], content[places[0]]
    else:
        content[first.start + rng.randrange(first.nbytes)] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def values(rng: random.Random, folder: Path) -> None:
    """A value that no tensor may hold, with hashes that fit: what somebody saved, not what a disk broke."""
    file = _file(rng, folder)
    tensors = load_file(file)
    name = rng.choice([name for name, tensor in sorted(tensors.items()) if tensor.is_floating_point()])
    bad = [float("nan"), -1.0, float("inf")] if name.endswith("_scale") else [float("nan")]
    flat = tensors[name].flatten()
    flat[rng.randrange(len(flat))] = rng.choice(bad)
    tensors[name] = flat.view_as(tensors[name])
    with safe_open(file, "pt") as content:
        save_file(tensors, file, content.metadata())


def files(rng: random.Random, folder: Path) -> None:
    """A shard that is missing, or has the content of another."""
    file, other = _file(rng, folder), _file(rng, folder)
    content = other.read_bytes()
    file.unlink()
    if rng.random() < 0.5:
        file.write_bytes(content)


DAMAGE: dict[str, Callable[[random.Random, Path], None]] = {
    "config.json, a field": _json_tree("config.json"),
    "config.json, quantization_config": quantization_config,
    "config.json, bytes": _json_bytes("config.json"),
    "generation_config.json, a field": _json_tree("generation_config.json"),
    "tokenizer_config.json, a field": _json_tree("tokenizer_config.json"),
    "tokenizer.json, bytes": _json_bytes("tokenizer.json"),
    "index, a field": _json_tree("model.safetensors.index.json"),
    "index, bytes": _json_bytes("model.safetensors.index.json"),
    "header, a field": header_tree,
    "header, bytes": header_bytes,
    "header, its length": header_length,
    "record, a field": record,
    "file, its length": length,
    "data": data,
    "values, with hashes": values,
    "shards": files,
}


def damage(number: int, folder: Path) -> str:
    """Damage a folder in a way that the number determines. Returns the kind."""
    rng = random.Random(number)
    kind = list(DAMAGE)[number % len(DAMAGE)]
    DAMAGE[kind](rng, folder)
    return kind
