"""The distribution in autoload/, installed from its folder: plain Transformers loads packed models."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import hf_pcdvq

ROOT = Path(__file__).resolve().parent.parent

LOAD = """
import sys
print("hf_pcdvq_autoload" in sys.modules)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder for PYTHONPATH with the distribution in it. Built from a copy: building writes into its folder."""
    folder = tmp_path_factory.mktemp("autoload")
    shutil.copytree(ROOT / "autoload", folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--target", folder / "site", folder / "source"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def packed(tiny_model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=hf_pcdvq.PcdvqConfig())
    model.save_pretrained(folder)
    return folder


def run(site, program, *arguments, **variables) -> subprocess.CompletedProcess:
    places = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": places, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "first",
    [
        "import torch",
        "import transformers.quantizers.auto",  # imports PyTorch itself
        "import torch, importlib.util; importlib.util.find_spec('transformers.quantizers.auto')",  # only asks
    ],
)
def test_plain_transformers_loads_a_packed_model(installed, packed, first):
    done = run(installed, first + LOAD, packed)
    assert done.stdout == "True\nQuantLinear\n", done.stderr
    assert "Warning" not in done.stderr


def test_import_torch_imports_neither_transformers_nor_the_plugin(installed):
    done = run(installed, "import torch, sys; print({'transformers', 'hf_pcdvq', 'accelerate'} & set(sys.modules))")
    assert done.stdout == "set()\n", done.stderr


def test_pytorchs_own_switch_turns_it_off(installed, packed):
    done = run(installed, "import torch" + LOAD, packed, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 1 and "Unknown quantization type, got pcdvq" in done.stderr


def test_a_broken_plugin_is_a_warning_and_other_models_load(installed, tiny_model_dir):
    program = (
        "import sys, torch; sys.modules['hf_pcdvq'] = None  # as if it could not be imported\n"
        "from transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    done = run(installed, program, tiny_model_dir)
    assert done.stdout == "LlamaForCausalLM\n", done.stderr
    assert "hf_pcdvq could not be imported, so packed models do not load" in done.stderr
