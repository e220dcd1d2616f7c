#!/usr/bin/env python3
"""Build the folder that Hugging Face's library `kernels` loads: the package in kernels/ once per backend, with metadata.

    python tools/build_kernel_repo.py --out kernel-repo
    python -c "from pathlib import Path; from kernels import get_local_kernel; get_local_kernel(Path('kernel-repo'))"
    hf upload ORGANIZATION/hf-pcdvq-kernels kernel-repo . --repo-type kernel --revision v1

The package is pure Python, so nothing is compiled. All variants have the same content; the library takes the one named
after the backend of the installed PyTorch. Each is imported under the `id` in its metadata.json, which changes whenever a
file does, and registers its ops in a namespace of that name, so several versions can be loaded in one process.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

from hf_pcdvq.files.folders import replace_folder

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "kernels"


def files_of(folder: Path) -> dict[str, str]:
    """The SHA-256, in base64, of every file in a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        file.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(file.read_bytes()).digest()).decode()
        for file in files
    }


def add_variant(build: Path, backend: str, general: dict[str, Any]) -> None:
    """Copy the package to `build/torch-<backend>` and describe it in metadata.json there."""
    package = general["name"].replace("-", "_")
    variant = build / f"torch-{backend}"
    shutil.copytree(SOURCE / "torch-ext" / package, variant, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    files = files_of(variant)
    version = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:10]
    metadata = {
        "name": general["name"],
        "id": f"_{package}_{backend}_{version}",
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": files},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def check_target(out: Path, name: str) -> None:
    """Refuse a folder that contains anything but an earlier build.

    Raises:
        FileExistsError: `out` is a file, or a folder that contains something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    made = [json.loads(file.read_text(encoding="utf-8")) for file in out.glob("build/*/metadata.json")]
    names = {item.name for item in out.iterdir()} if out.is_dir() else set()
    if (
        not made
        or any(metadata.get("name") != name for metadata in made)
        or names != {"LICENSE", "README.md", "build"}
    ):
        raise FileExistsError(f"{out} holds something else than an earlier build of {name}; choose another folder")


def build_repository(out: Path) -> None:
    """Write the folder `out`, or replace an earlier build, once everything is complete.

    Raises:
        FileExistsError: `out` is a file, or a folder that contains something else.
    """
    general = tomllib.loads((SOURCE / "build.toml").read_text(encoding="utf-8"))["general"]
    out = out.resolve()
    check_target(out, general["name"])
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        for backend in general["backends"]:
            add_variant(partial / "build", backend, general)
        head = f"---\nlibrary_name: kernels\nlicense: {general['license'].lower()}\n---\n\n"
        text = (SOURCE / "README.md").read_text(encoding="utf-8")
        (partial / "README.md").write_text(head + text, encoding="utf-8")
        shutil.copy(ROOT / "LICENSE", partial)
        replace_folder(out, partial)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    args = parser.parse_args()
    try:
        build_repository(args.out)
    except OSError as error:
        parser.exit(1, f"{error}\n")
    for file in sorted(args.out.glob("build/*/metadata.json")):
        print(file.parent, json.loads(file.read_text(encoding="utf-8"))["id"])


if __name__ == "__main__":
    main()
