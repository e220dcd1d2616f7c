"""A round trip with the oldest version of Transformers that setup.cfg allows, with the newest that installs, and with the
oldest PyTorch.

The rest of the suite runs on the versions of constraints.txt. Skipped where pip cannot reach a package, as for the builds of
PyTorch for CPUs, which are not on PyPI; those that are there bring gigabytes of CUDA.
"""

import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ROUND_TRIP = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
import hf_pcdvq

folder, ids = sys.argv[1], torch.arange(2, 30)[None]
sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 258}
sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
models = (
    lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
    lambda: MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2)),
)
for number, make in enumerate(models):
    make().bfloat16().save_pretrained(f"{folder}/dense-{number}")
    config = hf_pcdvq.PcdvqConfig()
    packed = AutoModelForCausalLM.from_pretrained(f"{folder}/dense-{number}", quantization_config=config)
    packed.save_pretrained(f"{folder}/packed-{number}")
    again = AutoModelForCausalLM.from_pretrained(f"{folder}/packed-{number}")
    assert torch.equal(again(ids).logits, packed(ids).logits)
    assert again.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 30)
print(transformers.__version__, torch.__version__)
"""


def floor(package: str, file: str = "setup.cfg") -> str:
    settings = configparser.ConfigParser()
    settings.read(ROOT / file)
    (line,) = [line for line in settings["options"]["install_requires"].split() if line.startswith(f"{package}>=")]
    return line.removeprefix(f"{package}>=").partition(",")[0]


def test_both_distributions_state_the_same_pytorch():
    assert floor("torch") == floor("torch", "kernels/setup.cfg")


@pytest.mark.parametrize(
    "requirement",
    [
        f"transformers=={floor('transformers')}.*",
        f"transformers>={floor('transformers')},<6",
        f"torch=={floor('torch')}.0+cpu",
    ],
    ids=["oldest", "newest", "oldest PyTorch"],
)
def test_quantizes_saves_and_loads(requirement, tmp_path):
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-compile",
        "--target",
        tmp_path / "site",
    ]
    installed = subprocess.run([*pip, requirement], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"{requirement} cannot be installed: {installed.stderr[-300:]}")
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", ROUND_TRIP, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(zip(("transformers", "torch"), done.stdout.split()[-2:], strict=True))
    (metadata,) = (tmp_path / "site").glob("t*-*.dist-info")
    package, _, version = metadata.name.removesuffix(".dist-info").partition("-")
    assert found[package] == version
