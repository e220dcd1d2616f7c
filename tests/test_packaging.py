"""What is installed, from wheels and in editable mode: the packages with their data, and nothing else."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import hf_pcdvq_kernels.version
import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = {"hf_pcdvq_kernels": ROOT / "kernels/torch-ext/hf_pcdvq_kernels"}
PLUGIN = {"hf_pcdvq": ROOT / "hf_pcdvq", "hf_pcdvq_cli": ROOT / "hf_pcdvq_cli"}
VLLM = {"hf_pcdvq_vllm": ROOT / "serving/vllm/hf_pcdvq_vllm"}
ROOTS = PLUGIN | KERNELS
COMMANDS = "optimum/commands/register/register_hf_pcdvq.py"  # in a namespace of Optimum
LIBRARY = "hf_pcdvq_kernels/cpu/libhfp.so"
# Folders with a distribution each, beside the root: the import packages that they contain.
DISTRIBUTIONS = {".": PLUGIN, "kernels": KERNELS, "serving/vllm": VLLM}


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


def settings_of(distribution: str) -> configparser.ConfigParser:
    settings = configparser.ConfigParser()
    settings.read(ROOT / distribution / "setup.cfg")
    return settings


def packages_on_disk(roots: dict[str, Path]) -> set[str]:
    """Dotted names of all folders that contain Python files."""
    found = set()
    for name, root in roots.items():
        for folder in {file.parent for file in root.rglob("*.py")}:
            found.add(".".join([name, *folder.relative_to(root).parts]))
    return found


def files_of(roots: dict[str, Path]) -> set[str]:
    """What a wheel with these packages must hold, apart from what is compiled."""
    return {
        f"{package}/{file.relative_to(root).as_posix()}"
        for package, root in roots.items()
        for file in root.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".so"
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the builds read. Building in the checkout would leave build/ behind, or reuse an old one."""
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "build")
    for name in ("hf_pcdvq", "hf_pcdvq_cli", "kernels", "optimum", "serving", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheels(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of every distribution, by its folder."""
    folder = tmp_path_factory.mktemp("wheels")
    sources = [source / name for name in DISTRIBUTIONS]
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, *sources, cwd=folder)
    built = {file.name.split("-")[0]: file for file in folder.glob("*.whl")}
    assert len(built) == len(DISTRIBUTIONS)
    return {name: built[settings_of(name)["metadata"]["name"]] for name in DISTRIBUTIONS}


@pytest.mark.parametrize(("distribution", "roots"), DISTRIBUTIONS.items())
def test_every_package_on_disk_is_listed(distribution, roots):
    namespaces = {COMMANDS.rpartition("/")[0].replace("/", ".")} if distribution == "." else set()
    listed = settings_of(distribution)["options"]["packages"].split()
    assert set(listed) == packages_on_disk(roots) | namespaces


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_pyproject_holds_only_the_build_system(distribution):
    with (ROOT / distribution / "pyproject.toml").open("rb") as stream:
        assert set(tomllib.load(stream)) == {"build-system"}


@pytest.mark.parametrize("distribution", [".", "serving/vllm"])
def test_the_kernels_are_required_in_the_version_that_is_here(distribution):
    required = settings_of(distribution)["options"]["install_requires"].split("\n")
    assert f"hf_pcdvq_kernels=={hf_pcdvq_kernels.version.__version__}" in required


@pytest.mark.parametrize(
    ("distribution", "needed"), [("kernels", {"torch", "triton"}), ("serving/vllm", {"hf_pcdvq_kernels", "vllm"})]
)
def test_what_vllm_runs_with_needs_neither_the_plugin_nor_its_transformers(distribution, needed):
    required = settings_of(distribution)["options"]["install_requires"].split("\n")
    names = {line.partition(";")[0].partition("=")[0].strip(" <>") for line in required if line}
    assert names == needed


@pytest.mark.parametrize(("distribution", "roots"), DISTRIBUTIONS.items())
def test_a_wheel_holds_its_packages_and_nothing_else(wheels, distribution, roots):
    wheel = wheels[distribution]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    # Built in the copy, whatever the checkout holds.
    added = {".": {COMMANDS}, "kernels": {LIBRARY}}.get(distribution, set())
    # The same wheel serves every version of Python and PyTorch; only that of the kernels is for one platform.
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert ("-any.whl" in wheel.name) == (distribution != "kernels")
    assert {name for name in names if ".dist-info/" not in name} == files_of(roots) | added
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


def test_the_installed_wheels_import_and_find_their_data(wheels, tmp_path):
    target = tmp_path / "target"
    pip("install", "--no-deps", "--target", target, wheels["."], wheels["kernels"], cwd=tmp_path)
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


def test_the_kernels_come_with_the_plugin_from_an_index(wheels, tmp_path):
    # With everything of the environment that runs the tests, as far as pip can see, except our own.
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    outer = Path(sysconfig.get_paths()["purelib"])
    for folder in [outer / "pip", *outer.glob("*.dist-info")]:
        if not folder.name.startswith("hf_pcdvq"):
            (site / folder.name).symlink_to(folder)
    options = ["--no-index", "--find-links", wheels["."].parent, "--dry-run", "--quiet", "--report", "-"]
    python = tmp_path / "venv/bin/python"
    report = json.loads(run(python, "-m", "pip", "install", *options, "hf_pcdvq", cwd=tmp_path))
    assert {entry["metadata"]["name"] for entry in report["install"]} == {"hf_pcdvq", "hf_pcdvq_kernels"}


def test_one_command_installs_both_from_a_checkout_and_needs_no_compiler(source, tmp_path, monkeypatch):
    for variable in ("CC", "CXX"):
        monkeypatch.setenv(variable, "no-such-compiler")
    python = isolated_python(tmp_path / "venv")
    # --ignore-installed: otherwise pip would consider the outer environment's installation.
    options = ["--no-deps", "--no-build-isolation", "--ignore-installed"]
    pip("install", *options, "--editable", source / "kernels", "--editable", source, cwd=tmp_path, python=python)
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
    path = KERNELS["hf_pcdvq_kernels"].parent
    assert run(sys.executable, "-P", "-c", program, cwd=tmp_path, path=path).strip() == "set()"
