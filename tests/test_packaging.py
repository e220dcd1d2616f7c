"""What is installed, from a wheel and in editable mode: the packages with their data, and nothing else."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOTS = {
    "hf_pcdvq": ROOT / "hf_pcdvq",
    "hf_pcdvq_cli": ROOT / "hf_pcdvq_cli",
    "hf_pcdvq_kernels": ROOT / "kernels/torch-ext/hf_pcdvq_kernels",
}
COMMANDS = "optimum/commands/register/register_hf_pcdvq.py"  # in a namespace of Optimum
LIBRARY = "hf_pcdvq_kernels/cpu/libhfp.so"


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """The standard output of a command that must succeed; `path` is searched for modules before site-packages."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments: str | Path, cwd: Path, python: str | Path = sys.executable) -> None:
    run(python, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd)


def packages_on_disk() -> set[str]:
    """Dotted names of all folders that contain Python files."""
    found = set()
    for name, root in ROOTS.items():
        for folder in {file.parent for file in root.rglob("*.py")}:
            found.add(".".join([name, *folder.relative_to(root).parts]))
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads. Building in the checkout would leave build/ behind, or reuse an old one."""
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    for name in ("hf_pcdvq", "hf_pcdvq_cli", "kernels", "optimum", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


def test_every_package_on_disk_is_listed():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    namespace = COMMANDS.rpartition("/")[0].replace("/", ".")
    assert set(settings["options"]["packages"].split()) == packages_on_disk() | {namespace}


def test_pyproject_holds_only_the_build_system():
    with (ROOT / "pyproject.toml").open("rb") as stream:
        assert set(tomllib.load(stream)) == {"build-system"}


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    expected = set()
    for package, root in ROOTS.items():
        files = [file for file in root.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
        expected |= {f"{package}/{file.relative_to(root).as_posix()}" for file in files}
    # Built in the copy, whatever the checkout holds. The same wheel serves every version of Python and PyTorch.
    expected |= {LIBRARY, COMMANDS}
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {"hf_pcdvq/codecs/data/pcdvq-a14-v1.safetensors", "hf_pcdvq/py.typed"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata


def isolated_python(environment):
    """Python with the packages of the environment that runs the tests, except what is installed there to be edited.

    A .pth file in a folder that is added in this way is not read.
    """
    venv.create(environment, with_pip=False, symlinks=True)
    (site,) = (environment / "lib").glob("python*/site-packages")
    (site / "outer.pth").write_text(sysconfig.get_paths()["purelib"])
    return environment / "bin/python"


def test_the_installed_wheel_imports_and_finds_its_data(wheel, tmp_path):
    target = tmp_path / "target"
    pip("install", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    assert (target / "bin/hf-pcdvq").is_file()
    program = (
        "import hf_pcdvq, hf_pcdvq_cli, hf_pcdvq_kernels\n"
        "from hf_pcdvq.codecs.codebook import load_codebook\n"
        "assert load_codebook('pcdvq-a16-v1')['patterns'].shape == (512, 8)\n"
        "print(hf_pcdvq.__file__, hf_pcdvq_cli.__file__, hf_pcdvq_kernels.__file__, sep='\\n')"
    )
    files = run(sys.executable, "-P", "-c", program, cwd=tmp_path, path=target).split()
    assert files == [str(target / name / "__init__.py") for name in ROOTS]
    program = "from optimum.commands.optimum_cli import main; main()"
    # This command would otherwise be there twice.
    shown = run(isolated_python(tmp_path / "venv"), "-P", "-c", program, "pcdvq", cwd=tmp_path, path=target)
    assert "hf-pcdvq quantize" in shown
    program = "from hf_pcdvq_kernels.cpu import library; print(library.PATH, type(library.load()).__name__)"
    assert run(sys.executable, "-P", "-c", program, cwd=tmp_path, path=target).split() == [
        str(target / LIBRARY),
        "Library",
    ]


def test_an_editable_install_points_to_the_checkout_and_needs_no_compiler(source, tmp_path, monkeypatch):
    for variable in ("CC", "CXX"):
        monkeypatch.setenv(variable, "no-such-compiler")
    python = isolated_python(tmp_path / "venv")
    # --ignore-installed: otherwise pip would consider the outer environment's installation.
    options = ["--no-deps", "--no-build-isolation", "--ignore-installed"]
    pip("install", *options, "--editable", source, cwd=tmp_path, python=python)
    program = "import hf_pcdvq, hf_pcdvq_kernels; print(hf_pcdvq.__file__, hf_pcdvq_kernels.__file__, sep='\\n')"
    files = [Path(file) for file in run(python, "-P", "-c", program, cwd=tmp_path).split()]
    assert files == [
        source / "hf_pcdvq/__init__.py",
        source / "kernels/torch-ext/hf_pcdvq_kernels/__init__.py",
    ]
    assert not (source / "kernels/torch-ext" / LIBRARY).exists()
    assert "Usage" in run(python.with_name("hf-pcdvq"), "--help", cwd=tmp_path)
    program = "from optimum.commands.optimum_cli import main; main()"
    assert "hf-pcdvq quantize" in run(python, "-P", "-c", program, "pcdvq", cwd=tmp_path)


def test_the_ops_need_neither_transformers_nor_the_plugin(tmp_path):
    program = "import sys, hf_pcdvq_kernels; print({'transformers', 'hf_pcdvq'} & set(sys.modules))"
    path = ROOTS["hf_pcdvq_kernels"].parent
    assert run(sys.executable, "-P", "-c", program, cwd=tmp_path, path=path).strip() == "set()"
